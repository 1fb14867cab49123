import numpy as np
import pytest

from recap_ds.data.windows import Windows, sample_windows


def windows_by_hand(human: list[bool], ends_task: bool, td_horizon: int, stride: int) -> Windows:
    """The rules of the format, frame by frame."""
    total, rows, since_start = len(human), [], 0
    for t in range(total):
        since_start = 0 if t == 0 or human[t] != human[t - 1] else since_start + 1
        if since_start % stride:
            continue
        valid = 0
        while t + valid < total and human[t + valid] == human[t]:
            valid += 1
        k = min(td_horizon, valid)
        while t + k > total - 1 and not ends_task:
            k -= 1
        rows.append((t, human[t], valid, k, k > 0 and t + k < total))
    return Windows(*map(np.array, zip(*rows, strict=True)))


@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("td_horizon", [1, 3, 50])
@pytest.mark.parametrize("ends_task", [True, False])
@pytest.mark.parametrize("pattern", ["0", "1", "01", "0000000", "0011100", "0101", "111000001", "0000000001"])
def test_windows_follow_the_rules(pattern, ends_task, td_horizon, stride):
    human = np.array([letter == "1" for letter in pattern])
    expected = windows_by_hand(human.tolist(), ends_task, td_horizon, stride)
    got = sample_windows(human, ends_task, td_horizon, stride)
    for name in Windows._fields:
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)


def test_every_correction_gives_a_sample_whatever_the_stride():
    human = np.zeros(40, dtype=bool)
    human[[5, 13, 14, 31]] = True
    frames = sample_windows(human, True, td_horizon=10, stride=10).frame.tolist()
    assert {5, 13, 31} <= set(frames)


def test_a_truncated_episode_ends_without_a_window():
    windows = sample_windows(np.zeros(4, dtype=bool), ends_task=False, td_horizon=2, stride=1)
    assert windows.next_offset.tolist() == [2, 2, 1, 0]
    assert windows.needs_next.tolist() == [True, True, True, False]
    assert windows.num_valid.tolist() == [4, 3, 2, 1]


def test_a_single_frame_of_success_is_all_ending():
    windows = sample_windows(np.zeros(1, dtype=bool), ends_task=True, td_horizon=10, stride=1)
    assert (windows.num_valid[0], windows.next_offset[0], windows.needs_next[0]) == (1, 1, False)
