"""``recap-ds checkpoints``: what is there, what is whole, and that pruning never takes the last good one."""

import shutil

import pytest

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.inventory import list_checkpoints
from recap_ds.checkpoint.retention import steps_let_go
from recap_ds.cli.main import main
from recap_ds.config import CheckpointConfig
from recap_ds.files.lock import lock_folder
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.recipe import dump_config
from tests.checkpoint.hand_made import make_config, make_run

STEPS = (10, 20, 30, 40)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config = make_config("frozen")
    keep = config.checkpoint.model_copy(update={"keep_last": 1, "keep_every_steps": 20})
    run = tmp_path_factory.mktemp("made") / "run"
    make_run(run, PiStarRECAPPolicy(config), STEPS, world=2)
    (run / "config.yaml").write_text(dump_config(config.model_copy(update={"checkpoint": keep})))
    return run


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run", symlinks=True)


def steps_of(run):
    return list(layout.step_folders(run / "checkpoints"))


def flip_a_bit(run, step, name="rank_00001.safetensors"):
    path = run / "checkpoints" / layout.step_name(step) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_list_says_what_there_is_without_reading_it(run, capsys):
    flip_a_bit(run, 20)  # does not show: sizes are right
    (run / "checkpoints/step_00000030/rank_00000.safetensors").write_bytes(b"cut")
    (run / "checkpoints/step_00000040/state.json").unlink()
    assert main(["checkpoints", "list", str(run)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "size", "saved", "(UTC)", "ranks", "marks", "state"]
    ends = ["whole", "whole", "has 3 bytes instead of", "state.json: cannot be read (No such file or directory)"]
    assert [line.split()[0] for line in lines] == [str(step) for step in STEPS]
    assert all(end in line for line, end in zip(lines, ends, strict=True))
    assert " best " in lines[0] and " latest " in lines[3]
    first = list_checkpoints(run)[0]
    on_disk = sum(path.stat().st_size for path in first.folder.iterdir())
    assert (first.bytes, first.world, first.marks) == (on_disk, 2, ("best",))
    assert first.saved_at.endswith("+00:00") and "MiB" in lines[0]


def test_verify_reads_every_byte_and_the_shared_base(run, capsys):
    assert main(["checkpoints", "verify", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}: 4 of 4 checkpoints are whole\n"
    flip_a_bit(run, 20)
    base = run / "base/model.safetensors"
    base.write_bytes(base.read_bytes()[:-1] + b"\1")
    assert main(["checkpoints", "verify", str(run / "checkpoints")]) == 1
    found = capsys.readouterr()
    assert found.out == f"{run}/checkpoints: 3 of 4 checkpoints are whole\n"
    assert found.err.splitlines() == [
        f"{run}/checkpoints/step_00000020: rank_00001.safetensors was changed or damaged (its checksum differs)",
        f"{run}/base: model.safetensors was changed or damaged (its checksum differs)",
    ]


def test_prune_says_first_and_removes_only_when_told(run, capsys):
    assert main(["checkpoints", "prune", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"would remove {run}/checkpoints/step_00000030 (") and "; --yes does it" in said[1]
    assert steps_of(run) == list(STEPS)
    assert main(["checkpoints", "prune", str(run), "--yes"]) == 0
    assert "1 removed, " in capsys.readouterr().out
    # 10 is the best, 20 and 40 are multiples, 40 is the last; nothing hidden is left.
    assert steps_of(run) == [10, 20, 40]
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[:2] == ["best", "latest"]
    assert main(["checkpoints", "prune", str(run), "--yes"]) == 0
    assert "0 removed, 0 B; 3 stay" in capsys.readouterr().out


def test_damaged_ones_count_for_nothing(run, capsys):
    flip_a_bit(run, 30)
    flip_a_bit(run, 40)
    assert main(["checkpoints", "prune", str(run), "--keep-last", "2", "--yes"]) == 0
    said = capsys.readouterr().out
    assert steps_of(run) == list(STEPS) and said.count("left alone, as it is not whole") == 2
    assert main(["checkpoints", "prune", str(run), "--damaged", "--yes"]) == 0
    assert steps_of(run) == [10, 20]


def test_without_a_whole_one_nothing_is_removed(run, capsys):
    for step in STEPS:
        flip_a_bit(run, step)
    assert main(["checkpoints", "prune", str(run), "--damaged", "--yes"]) == 2
    assert "none of its checkpoints is whole; nothing is removed" in capsys.readouterr().err
    assert steps_of(run) == list(STEPS)


def test_a_run_that_trains_is_not_pruned_by_another(run, capsys):
    lock = lock_folder(run)
    assert main(["checkpoints", "prune", str(run)]) == 0, "looking is allowed"
    assert main(["checkpoints", "prune", str(run), "--yes"]) == 2
    assert "a process trains in this folder" in capsys.readouterr().err and steps_of(run) == list(STEPS)
    lock.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "nowhere"], "RUN nowhere: there is no such folder"),
        (["verify", "."], "RUN .: holds no checkpoint"),
        (["prune", "nowhere", "--keep-last", "0"], "'0' is not a whole number of at least 1"),
        (["prune", "nowhere", "--yes"], "RUN nowhere: there is no such folder"),
        ([], "required"),
    ],
)
def test_wrong_input_ends_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["checkpoints", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("steps", "best", "keep", "gone"),
    [
        ([], None, {}, []),
        ([5, 1, 3], None, {"keep_last": 2}, [1]),
        ([1, 2, 3, 4], 1, {"keep_last": 1}, [2, 3]),
        ([10, 20, 30, 40, 50], None, {"keep_last": 1, "keep_every_steps": 20}, [10, 30]),
        ([1], None, {"keep_last": 5}, []),
    ],
)
def test_retention_as_a_function(steps, best, keep, gone):
    assert steps_let_go(steps, best, CheckpointConfig(**keep)) == gone


def test_what_pointed_at_a_removed_damaged_one_points_at_a_whole_one_or_nowhere(run):
    flip_a_bit(run, 10)  # best
    flip_a_bit(run, 40)  # latest
    assert main(["checkpoints", "prune", str(run), "--keep-last", "2", "--damaged", "--yes"]) == 0
    checkpoints = run / "checkpoints"
    assert steps_of(run) == [20, 30]
    assert layout.linked_step(checkpoints, layout.LATEST) == 30
    assert not (checkpoints / layout.BEST).is_symlink()


def test_a_copy_under_another_name_is_not_whole(run, capsys):
    shutil.copytree(run / "checkpoints/step_00000030", run / "checkpoints/step_00000050")
    assert main(["checkpoints", "verify", str(run)]) == 1
    assert "is named step_00000050 and holds step 30" in capsys.readouterr().err
    assert list_checkpoints(run)[-1].problems == ("is named step_00000050 and holds step 30",)


def test_a_single_checkpoint_is_no_run(run, capsys):
    assert main(["checkpoints", "list", str(run / "checkpoints/step_00000030")]) == 2
    assert "is one checkpoint; name the run" in capsys.readouterr().err
