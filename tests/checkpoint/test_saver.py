"""A run's saves over time: in the background, behind time, failed and tried again. Two ranks: test_resume.py."""

import errno
import threading

import pytest
import torch

from recap_ds.checkpoint import save as save_module
from recap_ds.checkpoint import saver as saver_module
from recap_ds.checkpoint.record import CheckpointRecord, verify_checkpoint
from recap_ds.checkpoint.saver import CheckpointSaver
from recap_ds.config import CheckpointConfig
from recap_ds.distributed import host_copy
from recap_ds.distributed.host_copy import HostCopy
from recap_ds.errors import RunFailed


@pytest.fixture
def saver_of(one_rank, runtime, tmp_path):
    """(newest_step, settings) -> (saver, what it said)."""

    def build(newest_step: int | None = 1, **keep):
        said: list[str] = []
        saver = CheckpointSaver(
            tmp_path,
            runtime=runtime,
            engine=one_rank.engine,
            shadows=one_rank.shadows,
            keep=CheckpointConfig(keep_last=9, **keep),
            newest_step=newest_step,
            say=said.append,
        )
        return saver, said

    return build


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing waits until this is set."""
    may_write, whole = threading.Event(), saver_module.write_files

    def slow(save, rank):
        assert may_write.wait(60)
        return whole(save, rank)

    monkeypatch.setattr(saver_module, "write_files", slow)
    yield may_write
    may_write.set()


@pytest.fixture
def disk(monkeypatch):
    """A disk that is full while ``disk.full`` is True."""
    whole = save_module.write_tile_file

    class Disk:
        full = True

        def write(self, path, tiles):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return whole(path, tiles)

    disk = Disk()
    monkeypatch.setattr(save_module, "write_tile_file", disk.write)
    return disk


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_in_the_background_a_save_is_committed_at_a_later_boundary(saver_of, slow_disk, tmp_path):
    saver, said = saver_of(background=True)
    ring = {"values": torch.ones(3, dtype=torch.float64)}
    state = {"step": 4}
    assert saver.save(4, state, ring) and saver.writing
    ring["values"].zero_()  # as training goes on
    state["step"] = 5
    for writing_anywhere in (False, False, True):
        # What was agreed at the first boundary was posted before the save: it says nothing.
        saver.advance(writing_anywhere or saver.writing)
        assert names(tmp_path) == [".step_00000004.unfinished"]
    slow_disk.set()
    while saver.writing:
        saver.advance(True)
    assert names(tmp_path) == [".step_00000004.unfinished"]  # another rank still writes
    saver.advance(False)
    assert names(tmp_path) == ["latest", "step_00000004"] and said == []
    assert verify_checkpoint(tmp_path / "step_00000004") == []
    record = CheckpointRecord.load(tmp_path / "step_00000004")
    assert record.state == {"step": 4} and record.saved_at.endswith("+00:00")
    saver.advance(False)  # nothing to do any more


def test_a_stale_flag_commits_nothing(saver_of, tmp_path):
    saver, _ = saver_of(background=True)
    saver.save(4, {}, {})
    while saver.writing:
        pass
    saver.advance(False)  # posted before the save
    assert names(tmp_path) == [".step_00000004.unfinished"]
    saver.advance(False)
    assert names(tmp_path) == ["latest", "step_00000004"]


def test_a_save_that_is_due_too_soon_waits_and_says_so(saver_of, slow_disk, tmp_path):
    saver, said = saver_of(background=True)
    saver.save(4, {}, {})
    threading.Timer(0.2, slow_disk.set).start()
    saver.save(5, {}, {})
    assert names(tmp_path) == [".step_00000005.unfinished", "latest", "step_00000004"]
    (line,) = said
    assert line.startswith(
        "warning: step 4 is still being written and step 5 is due: training waits; raise checkpoint.sa"
    )
    saver.finish()
    saver.finish()
    assert names(tmp_path) == ["latest", "step_00000004", "step_00000005"]


@pytest.mark.parametrize("ending", [{"best": True}, {"last": True}])
def test_the_best_and_the_last_are_complete_on_return_and_so_is_what_came_before(saver_of, tmp_path, ending):
    saver, _ = saver_of(background=True)
    saver.save(4, {}, {})
    saver.save(5, {}, {}, **ending)
    best = ["best"] if "best" in ending else []
    assert names(tmp_path) == [*best, "latest", "step_00000004", "step_00000005"] and not saver.writing


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_tried_again_and_then_ends_the_run(saver_of, disk, tmp_path, background):
    saver, said = saver_of(background=background, max_failed_saves=2)

    def save(step):
        saver.save(step, {}, {})
        saver.finish()

    save(2)
    assert names(tmp_path) == [] and said == [
        f"warning: saving step 2 failed ({tmp_path}/.step_00000002.unfinished/rank_00000.safetensors: No space left on "
        "device); training goes on, step_00000001 is whole and the next save tries again "
        "(1 of checkpoint.max_failed_saves=2)"
    ]
    disk.full = False
    save(3)
    disk.full = True
    save(4)  # the first in a row again
    assert "step_00000003 is whole" in said[1] and "(1 of" in said[1]
    with pytest.raises(RunFailed, match=r"saving step 5 failed .*free space"):
        save(5)
    assert names(tmp_path) == ["latest", "step_00000003"]


def test_without_a_checkpoint_to_fall_back_on_the_first_failure_ends_the_run(saver_of, disk):
    saver, said = saver_of(newest_step=None)
    with pytest.raises(RunFailed, match="saving step 2 failed"):
        saver.save(2, {}, {})
    assert said == []


def test_the_last_save_must_succeed(saver_of, disk):
    saver, _ = saver_of()
    assert saver.save(2, {}, {}, best=True) is False
    with pytest.raises(RunFailed, match="saving step 3 failed"):
        saver.save(3, {}, {}, last=True)


def test_a_disk_that_is_gone_is_not_made_anew(saver_of, tmp_path):
    saver, said = saver_of()
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    saver._checkpoints = tmp_path / "checkpoints"
    assert saver.save(2, {}, {}) is False and "No such file or directory" in said[0]
    assert not tmp_path.exists()


def test_host_memory_is_used_again_and_holds_what_was_there(monkeypatch):
    monkeypatch.setattr(host_copy, "CHUNK_ELEMENTS", 8)
    tensors = [torch.arange(float(size)) for size in (3, 5, 1, 20, 0, 4)]
    room = HostCopy(tensors)
    first = room.take(tensors)
    kept = [copy.clone() for copy in first]
    for tensor in tensors:
        tensor.add_(1)
    assert all(torch.equal(copy, before) for copy, before in zip(first, kept, strict=True))
    again = room.take(tensors)
    assert [copy.data_ptr() for copy in again] == [copy.data_ptr() for copy in first]
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(again, tensors, strict=True))
