"""Whatever happens to the files of a checkpoint, the newest whole one is found and the others are named."""

import json
import shutil

import pytest

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.record import verify_checkpoint
from recap_ds.checkpoint.resume import find_checkpoint
from recap_ds.errors import UsageError
from recap_ds.models.policy import PiStarRECAPPolicy
from tests.checkpoint.hand_made import make_checkpoint, make_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    checkpoints = tmp_path_factory.mktemp("run") / "checkpoints"
    policy = PiStarRECAPPolicy(make_config("frozen"))
    for step in (1, 2):
        make_checkpoint(checkpoints / layout.step_name(step), policy, step, world=2)
    layout.set_link(checkpoints, layout.LATEST, 2)
    return checkpoints


@pytest.fixture
def checkpoints(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "checkpoints", symlinks=True)


def truncate(folder):
    path = folder / layout.rank_file_name(1)
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder):
    path = folder / layout.rank_file_name(0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def change_the_record(folder):
    path = folder / layout.STATE_NAME
    path.write_text(path.read_text().replace('"step": 2', '"step": 3', 1))


def another_format(folder):
    path = folder / layout.STATE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))


def cut_the_record(folder):
    path = folder / layout.STATE_NAME
    path.write_text(path.read_text()[:200])


DAMAGES = [
    (truncate, "rank_00001.safetensors has"),
    (flip_a_bit, "rank_00000.safetensors was changed or damaged"),
    (lambda folder: (folder / layout.rank_file_name(1)).unlink(), "rank_00001.safetensors is missing"),
    (lambda folder: (folder / layout.SHARED_NAME).unlink(), "shared.safetensors is missing"),
    (lambda folder: (folder / layout.STATE_NAME).unlink(), "cannot be read"),
    (change_the_record, "state.json: was changed or damaged"),
    (cut_the_record, "cut off or not JSON"),
    (another_format, "has format 99"),
]


def test_whole_checkpoints_verify(checkpoints, runtime, capsys):
    assert verify_checkpoint(checkpoints / "step_00000001") == []
    assert find_checkpoint(checkpoints, runtime) == checkpoints / "step_00000002"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_damaged_one_is_skipped_with_the_reason(checkpoints, runtime, capsys, damage, said):
    damage(checkpoints / "step_00000002")
    assert find_checkpoint(checkpoints, runtime) == checkpoints / "step_00000001"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("checkpoint: skipped step_00000002: ") and said in line


def test_half_written_folders_and_dead_links_are_no_checkpoints(checkpoints, runtime, capsys):
    (checkpoints / "step_00000002").rename(checkpoints / layout.unfinished_name(2))
    assert (checkpoints / "latest").is_symlink() and not (checkpoints / "latest").exists()
    assert find_checkpoint(checkpoints, runtime) == checkpoints / "step_00000001"
    assert capsys.readouterr().out == ""


def test_damaged_ones_alone_are_not_written_over(checkpoints, runtime):
    for step in (1, 2):
        truncate(checkpoints / layout.step_name(step))
    with pytest.raises(UsageError, match=r"\(2 tried\) is whole, the newest is step_00000002: rank_00001") as caught:
        find_checkpoint(checkpoints, runtime)
    assert str(caught.value).startswith(f"{checkpoints}: ") and "\n" not in str(caught.value)
    assert str(caught.value).endswith("move this folder away to start over, or restore one of them")


def test_a_run_without_checkpoints_begins(runtime, tmp_path):
    assert find_checkpoint(tmp_path / "never_started", runtime) is None
    (tmp_path / "empty" / layout.unfinished_name(1)).mkdir(parents=True)
    assert find_checkpoint(tmp_path / "empty", runtime) is None
