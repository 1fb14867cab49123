"""One run on 2, 1, 4 and 2 ranks, in other stages and with other accumulation, trains as on 2 throughout."""

import json
import shutil

import pytest

from tests.checkpoint.elastic_worker import KINDS, legs
from tests.distributed.harness import run_ranks

WORKER = "checkpoint.elastic_worker"
# The first leg, steps 0 to 3 under zero3, is ``two_ranks``.
LEGS = [(1, "4", "6", "zero2", "2"), (4, "6", "8", "zero3_offload", "1"), (2, "8", "10", "zero3", "2")]


@pytest.fixture(scope="module")
def changed(two_ranks, runtime, tmp_path_factory):
    """What each leg reported, in order."""
    folder = tmp_path_factory.mktemp("elastic")
    for kind in KINDS:
        shutil.copytree(two_ranks[0] / kind, folder / kind, symlinks=True)
    reported = []
    for world, *arguments in LEGS:
        there = [str(folder), *arguments]
        reported.append(legs(runtime, *there) if world == 1 else run_ranks(WORKER, world, *there)[0])
    return folder, reported


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_two_ranks(changed, kind):
    folder, reported = changed
    losses = [loss for leg in reported for loss in leg[kind]["losses"]]
    assert losses == pytest.approx(json.loads((folder / kind / "truth.json").read_text()), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_targets_and_averages_end_as_on_two_ranks(changed, kind):
    _, reported = changed
    assert reported[-1][kind]["distance"] < 5e-6
    # The measure sees two steps of training.
    assert reported[0][kind]["distance"] > 1e-3
