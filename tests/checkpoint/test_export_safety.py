"""Exports that are cut off, written where nothing may be written, read back wrong, or wanted by two at once."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from recap_ds.checkpoint import on_demand
from recap_ds.checkpoint.consolidate import consolidate
from recap_ds.checkpoint.on_demand import export_of
from recap_ds.distributed.runtime import RankInfo
from recap_ds.errors import RunFailed, UsageError
from recap_ds.files.tensors import TensorFileWriter
from recap_ds.models import export_write
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import load_pretrained
from tests.checkpoint.hand_made import make_checkpoint, make_config, make_run

NOBODY = 65534


@pytest.fixture(scope="module")
def trained():
    return PiStarRECAPPolicy(make_config("lora"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, trained):
    folder = tmp_path_factory.mktemp("runs") / "tiny_lora"
    make_run(folder, trained, steps=(5,))
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- cut off ----------------------------------------------------------------------------------------------------------

KILLED_WHILE_WRITING = """
import os, signal, sys
from recap_ds.checkpoint.consolidate import consolidate
from recap_ds.files.tensors import TensorFileWriter
finish, left = TensorFileWriter.finish, [int(sys.argv[3])]
def finish_and_die(writer):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(writer)
TensorFileWriter.finish = finish_and_die
consolidate(sys.argv[1], sys.argv[2], overwrite=True)
"""


def test_a_killed_export_leaves_nothing_that_looks_whole_and_the_same_command_works(run, tmp_path):
    out = tmp_path / "export"
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(run), str(out), "4"]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert names(tmp_path) == [".export.unfinished"]
    assert "action_expert.safetensors" in names(tmp_path / ".export.unfinished")  # it had come that far
    with pytest.raises(UsageError, match=r"export\.json: cannot be read"):
        load_pretrained(tmp_path / ".export.unfinished")
    consolidate(run, out, overwrite=True)
    assert names(tmp_path) == ["export"] and ".lock" not in names(out)
    load_pretrained(out)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("older", [False, True])
def test_a_failed_export_frees_the_disk_and_keeps_the_older_one(run, tmp_path, monkeypatch, error, older):
    out = tmp_path / "export"
    if older:
        consolidate(run, out)
    monkeypatch.setattr(TensorFileWriter, "finish", lambda writer: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        consolidate(run, out, overwrite=True)
    assert names(tmp_path) == (["export"] if older else [])
    if older:
        load_pretrained(out)


def test_an_export_that_was_cut_off_between_its_renames_is_made_good(run, tmp_path):
    out = tmp_path / "export"
    consolidate(run, out)
    shutil.copytree(out, tmp_path / ".export.old")  # killed before the old one was removed
    consolidate(run, out, overwrite=True)
    assert names(tmp_path) == ["export"]
    out.rename(tmp_path / ".export.old")  # killed between the two renames
    consolidate(run, out)
    assert names(tmp_path) == ["export"]


def test_what_the_disk_does_not_give_back_is_no_export(run, tmp_path, monkeypatch):
    whole = export_write.sync_file

    def flip(path):
        whole(path)
        if path.name == "critic.safetensors":
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(export_write, "sync_file", flip)
    with pytest.raises(RunFailed, match=r"read back after writing, critic\.safetensors was changed or damaged"):
        consolidate(run, tmp_path / "export")
    assert names(tmp_path) == []


def test_two_at_once_do_not_mix(run, tmp_path):
    unfinished = tmp_path / ".export.unfinished"
    unfinished.mkdir()
    with open(unfinished / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunFailed, match="another process is writing this export; wait for it"):
            consolidate(run, tmp_path / "export")
        assert names(tmp_path) == [".export.unfinished"]  # and the other's work is untouched
    consolidate(run, tmp_path / "export")
    assert names(tmp_path) == ["export"]


@pytest.mark.parametrize("make", [lambda path: path.symlink_to(path.parent), lambda path: path.touch()])
def test_out_must_be_a_folder_of_its_own(run, tmp_path, make):
    make(tmp_path / "export")
    with pytest.raises(UsageError, match=r"OUT .*export: is "):
        consolidate(run, tmp_path / "export", overwrite=True)


# -- from a folder that may only be read ------------------------------------------------------------------------------


@pytest.fixture
def read_only(run):
    """A run in which nobody may write, in a folder that every user may enter; and a folder to write to beside it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o755)
        copy = shutil.copytree(run, place / "run", symlinks=True)
        for path in [copy, *copy.rglob("*")]:
            if not path.is_symlink():
                path.chmod(0o555 if path.is_dir() else 0o444)
        out = place / "out"
        out.mkdir()
        out.chmod(0o777)
        yield copy, out
        for path in [copy, *copy.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)


@contextmanager
def without_privileges():
    """Root may write anywhere, whatever the modes say."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_it_reads_a_run_that_nobody_may_write_to(run, read_only, tmp_path):
    folder, out = read_only
    expected = consolidate(run, tmp_path / "export")  # and all is imported, whoever may read the packages
    with without_privileges():
        with pytest.raises(PermissionError):
            (folder / "checkpoints/file").touch()
        record = consolidate(folder / "latest", out / "export")
        assert record.files == expected.files
        with pytest.raises(UsageError, match=r"cannot be written to \(Permission denied\); make an export elsewhere"):
            export_of(folder, RankInfo())
    assert export_of(out / "export", RankInfo()) == out / "export"


# -- made on demand, beside the run -----------------------------------------------------------------------------------


def test_an_export_on_demand_is_made_once_and_again_when_the_step_was_saved_again(run, trained, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    first = export_of(copy, RankInfo())
    assert first.parent == copy / "exports" and first.name.startswith("step_00000005-")
    made = []
    monkeypatch.setattr(on_demand, "consolidate", lambda *paths: made.append(paths) or consolidate(*paths))
    assert export_of(copy / "latest", RankInfo()) == first and made == []

    step = copy / "checkpoints/step_00000005"
    shutil.rmtree(step)
    make_checkpoint(step, PiStarRECAPPolicy(make_config("lora")), step=5, world=2)  # the same weights, other files
    second = export_of(copy, RankInfo())
    assert second != first and len(made) == 1 and load_pretrained(second).contract is not None
