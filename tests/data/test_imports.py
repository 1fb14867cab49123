import errno
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import pytest

from recap_ds.data.manifest import Manifest
from recap_ds.data.rebuild import rebuild
from recap_ds.errors import RunFailed, UsageError
from tests.data.made_episodes import BrokenFrames, made_episode, write
from tests.data.test_writer import files_of

JOB = {"files": "a checksum", "keys": ("state",)}


def test_the_same_import_again_does_nothing(tmp_path):
    first = write(tmp_path, [made_episode(0), made_episode(1)], job=JOB)
    write(tmp_path, [made_episode(name="new/0")], dataset="new", job=JOB)
    before = files_of(tmp_path)
    again = write(tmp_path, iter(()), job=JOB)  # its episodes are not even asked for
    assert again.was_there and not first.was_there
    assert (again.num_episodes, again.num_samples, again.new_shards) == (2, 14, first.new_shards)
    assert files_of(tmp_path) == before and "imports.json" in before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"job": {"files": "another", "keys": ("state",)}}, "imported with other files; give this one another name"),
        ({"job": {"files": "a checksum"}}, "with other keys;"),
        ({"job": JOB, "stride": 2, "seed": 1}, "with other seed, stride;"),
        ({}, "episode set/0 is already in"),  # nobody said what is imported
    ],
)
def test_another_import_of_that_name_is_refused_with_what_differs(tmp_path, changes, named):
    write(tmp_path, [made_episode(0)], job=JOB)
    with pytest.raises(UsageError, match=named):
        write(tmp_path, [made_episode(0)], **changes)


def test_an_import_whose_shards_are_gone_or_changed_is_not_there(tmp_path):
    write(tmp_path, [made_episode(name="old/0")], dataset="old")
    write(tmp_path, [made_episode(0)], job=JOB)
    (tmp_path / "demo-000001.tar").unlink()
    rebuild(tmp_path)
    assert not write(tmp_path, [made_episode(0)], job=JOB).was_there
    assert Manifest.load(tmp_path).num_samples == 14
    (tmp_path / "imports.json").write_text("{}")
    with pytest.raises(UsageError, match=r"imports\.json: was not written by recap_ds; remove it"):
        write(tmp_path, [made_episode(0)], job=JOB)


def test_an_interrupted_import_goes_on_with_the_pictures_it_had(tmp_path):
    whole = [made_episode(i) for i in range(3)]
    write(tmp_path / "whole", whole, job=JOB)
    out = tmp_path / "out"
    for _ in range(2):  # interrupted twice
        with pytest.raises(RuntimeError, match="camera file"):
            write(out, [*whole[:2], replace(whole[2], read_frames=BrokenFrames())], job=JOB)
    (out / ".writing" / "00000001.spool").write_bytes(b"cut off")
    # The first episode's pictures are not read again; the second's were damaged, the third's never made.
    report = write(out, [replace(whole[0], read_frames=BrokenFrames()), *whole[1:]], job=JOB)
    assert report.num_resumed == 1
    assert files_of(out) == files_of(tmp_path / "whole") and not (out / ".writing").exists()


@dataclass(frozen=True)
class FailingFrames:
    error: BaseException

    def __call__(self, frames):
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; mend that and start again"),
        # What the pool raises where a worker dies at once.
        (BrokenProcessPool(), "a process for images was killed, .* fewer --jobs"),
    ],
)
def test_what_the_machine_lacks_is_one_line_and_nothing_is_lost(tmp_path, error, message):
    whole = [made_episode(i) for i in range(3)]
    with pytest.raises(RunFailed, match=message):
        write(tmp_path, [*whole[:2], replace(whole[2], read_frames=FailingFrames(error))], job=JOB)
    assert write(tmp_path, whole, job=JOB).num_resumed == 2


def test_what_another_import_left_is_not_used(tmp_path):
    broken = [made_episode(0), made_episode(1, read_frames=BrokenFrames())]
    with pytest.raises(RuntimeError, match="camera file"):
        write(tmp_path, broken, job=JOB)
    assert len(list((tmp_path / ".writing").glob("*.spool.npz"))) == 1
    with pytest.raises(RuntimeError, match="camera file"):
        write(tmp_path, [made_episode(0, read_frames=BrokenFrames())], job={**JOB, "files": "another"})
    assert list((tmp_path / ".writing").glob("*.spool.npz")) == []
    # Where the data are at fault, the same data will not do next time either.
    with pytest.raises(UsageError, match="fps"):
        write(tmp_path, [made_episode(0), made_episode(1, fps=11.0)], job=JOB)
    assert files_of(tmp_path) == {}
