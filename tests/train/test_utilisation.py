"""MFU: absent where the peak is not known, else useful operations over time times peak."""

import pytest
import torch

from recap_ds.train.utilisation import NAME, STEP_TIME, Utilisation, peak_flops


def test_the_share_of_the_peak_in_the_median_step():
    timings = {STEP_TIME: 2.0, "time/samples_per_second": 3.0}
    assert Utilisation(flops=600, peak_flops=1000.0).add_to(timings) == {**timings, NAME: pytest.approx(0.3)}


def test_no_figure_without_a_peak():
    assert Utilisation(flops=0, peak_flops=None).add_to({STEP_TIME: 2.0}) == {STEP_TIME: 2.0}


def test_a_cpu_has_no_peak_unless_one_is_given():
    assert peak_flops(None, torch.device("cpu"), torch.float32) is None
    assert peak_flops(0.5, torch.device("cpu"), torch.float32) == 5e11
