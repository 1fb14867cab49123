"""MFU: absent where the peak is not known, else useful operations over time times peak."""

from types import SimpleNamespace

import pytest
import torch

from recap_ds.config import BatchSizes
from recap_ds.distributed.ds_config import Precision
from recap_ds.distributed.runtime import RankInfo
from recap_ds.plan.measure import count_model_flops
from recap_ds.train.utilisation import NAME, STEP_TIME, Utilisation
from tests.tiny import tiny_config


def test_the_share_of_the_peak_in_the_median_step():
    timings = {STEP_TIME: 2.0, "time/samples_per_second": 3.0}
    assert Utilisation(flops=600, peak_flops=1000.0).add_to(timings) == {**timings, NAME: pytest.approx(0.3)}


def test_no_figure_without_a_peak():
    assert Utilisation(flops=0, peak_flops=None).add_to({STEP_TIME: 2.0}) == {STEP_TIME: 2.0}


def session_on_a_cpu(**logging):
    config = tiny_config(training={"activation_checkpointing": True, "batch_size": 4}, logging=logging)
    plan = SimpleNamespace(
        config=config,
        info=RankInfo(),
        precision=Precision(torch.float32, ""),
        start=None,
        contract=SimpleNamespace(slots=("front", "wrist")),
        sizes=BatchSizes(micro=4, accumulation=3, world=1),
    )
    return SimpleNamespace(plan=plan, runtime=SimpleNamespace(device=torch.device("cpu")))


def test_a_cpu_has_no_peak_unless_one_is_given():
    assert Utilisation.of(session_on_a_cpu()) == (0, None)


def test_a_step_is_all_its_micro_batches_without_recomputation():
    session = session_on_a_cpu(peak_tflops=0.5)
    once = count_model_flops(session.plan.config, torch.float32, None, num_cameras=2)
    assert Utilisation.of(session) == (3 * once, 5e11)
