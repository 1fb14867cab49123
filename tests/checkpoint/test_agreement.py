"""What one rank's failure becomes; that all ranks share it is tested in test_resume on two."""

import errno

import pytest

from recap_ds.checkpoint.agreement import on_every_rank, on_main
from recap_ds.errors import RunFailed, UsageError


def failing(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize("together", [on_main, on_every_rank])
def test_kinds_of_failure_are_kept_apart(runtime, together):
    assert together(runtime, lambda: [1, "a"]) == [1, "a"]
    with pytest.raises(UsageError, match="wrong key"):
        together(runtime, failing(UsageError("wrong key")))
    with pytest.raises(RunFailed, match=r"^/disk: No space left on device$"):
        together(runtime, failing(OSError(errno.ENOSPC, "No space left on device", "/disk")))
    bug = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError) as caught:
        together(runtime, failing(bug))
    assert caught.value is bug  # with its traceback


@pytest.mark.parametrize("together", [on_main, on_every_rank])
def test_a_long_message_is_cut_and_not_lost(runtime, together):
    with pytest.raises(UsageError, match=r"^x{500}"):
        together(runtime, failing(UsageError("x" * 10_000)))
