"""A hang is written down and ends the process; what moves is left alone. Launched ranks: test_endings.py."""

import threading

import pytest

from recap_ds.distributed.runtime import RankInfo
from recap_ds.train import watchdog as watchdog_module
from recap_ds.train.failures import FailureLog
from recap_ds.train.watchdog import Watchdog


@pytest.fixture
def exits(monkeypatch):
    """Exit codes asked for, and an event for the first; nothing is ended, and no timer of C's is left behind."""
    codes, happened, over = [], threading.Event(), threading.Event()

    def leave(code: int) -> None:
        codes.append(code)
        happened.set()
        over.wait(30)  # nothing comes after it

    monkeypatch.setattr(watchdog_module.os, "_exit", leave)
    monkeypatch.setattr(watchdog_module, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(watchdog_module.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    yield codes, happened
    over.set()


def stuck_in_a_collective(release: threading.Event) -> None:
    release.wait(30)


def test_a_hang_leaves_the_stacks_of_all_threads_and_a_line(exits, tmp_path, capsys):
    codes, happened = exits
    release = threading.Event()
    threading.Thread(target=stuck_in_a_collective, args=(release,)).start()
    log = FailureLog(tmp_path / "failures", rank=0)
    with Watchdog(log, RankInfo(), timeout_seconds=0.2) as watchdog:
        watchdog.mark("step 12")
        assert happened.wait(30)
    release.set()
    assert codes == [1]
    said = capsys.readouterr().err
    assert said == (
        "error: rank 0: nothing moved for 0.2 s (training.hang_timeout_seconds) since: step 12; "
        f"stacks of every rank are in {tmp_path / 'failures'}\n"
    )
    written = log.path.read_text()
    assert "since: step 12" in written and "stuck_in_a_collective" in written and "test_watchdog.py" in written


def test_another_local_rank_leaves_its_stacks_without_a_line(exits, tmp_path, capsys, monkeypatch):
    _, happened = exits
    monkeypatch.setattr(watchdog_module, "GRACE_SECONDS", -0.9)
    log = FailureLog(tmp_path, rank=3)
    with Watchdog(log, RankInfo(rank=3, local_rank=1, world=4, local_world=2), timeout_seconds=0.2):
        assert happened.wait(30)
    assert capsys.readouterr().err == "" and (tmp_path / "rank_3.txt").stat().st_size


def test_marks_keep_it_quiet_and_so_does_null(exits, tmp_path):
    codes, happened = exits
    with Watchdog(FailureLog(tmp_path, 0), RankInfo(), timeout_seconds=5.0) as watchdog:
        for number in range(20):
            watchdog.mark(f"step {number}")
            assert not happened.wait(0.01)
        assert watchdog.place == "step 19"
    running = threading.active_count()
    with Watchdog(FailureLog(tmp_path, 0), RankInfo(), timeout_seconds=None):
        assert threading.active_count() == running
    assert codes == [] and not list(tmp_path.iterdir())


def test_failures_are_added_to_the_file(tmp_path):
    log = FailureLog(tmp_path / "failures", rank=2)
    for number in range(2):
        try:
            raise KeyError(f"number {number}")
        except KeyError as error:
            log.exception(f"why {number}", error, "notes\n")
    text = (tmp_path / "failures" / "rank_2.txt").read_text()
    assert text.count("=== 20") == text.count("Traceback") == text.count("notes\n") == 2
    assert text.index("why 0") < text.index("KeyError: 'number 0'") < text.index("why 1")


def test_a_disk_that_refuses_leaves_the_failure_on_stderr(tmp_path, capsys):
    (tmp_path / "file").touch()
    FailureLog(tmp_path / "file" / "failures", rank=0).exception("why", KeyError("elbow"), "memory: 3\n")
    assert capsys.readouterr().err == "KeyError: 'elbow'\nmemory: 3\n\n"
