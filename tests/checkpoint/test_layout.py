import os

import pytest

from recap_ds.checkpoint import layout
from recap_ds.errors import UsageError


def make_steps(run, *steps):
    for step in steps:
        folder = run / "checkpoints" / layout.step_name(step)
        folder.mkdir(parents=True)
        (folder / layout.STATE_NAME).touch()
    return run / "checkpoints"


def test_step_names_go_there_and_back():
    assert layout.step_name(500) == "step_00000500"
    assert [layout.parse_step(layout.step_name(step)) for step in (0, 7, 10**9)] == [0, 7, 10**9]
    assert [layout.parse_step(name) for name in ("step_5", ".step_00000005", "step_00000005.old", "latest")] == [
        None
    ] * 4


def test_steps_are_listed_in_order_without_links_and_unfinished_ones(tmp_path):
    checkpoints = make_steps(tmp_path, 20, 100, 3)
    (checkpoints / layout.unfinished_name(200)).mkdir()
    layout.set_link(checkpoints, "latest", 100)
    assert list(layout.step_folders(checkpoints)) == [3, 20, 100]


def test_links_are_relative_and_move(tmp_path):
    checkpoints = make_steps(tmp_path / "run", 1, 2)
    layout.set_link(checkpoints, "latest", 1)
    layout.set_link(checkpoints, "latest", 2)
    assert os.readlink(checkpoints / "latest") == "step_00000002"
    (tmp_path / "run").rename(tmp_path / "moved")
    assert layout.linked_step(tmp_path / "moved" / "checkpoints", "latest") == 2


def test_every_spelling_of_a_checkpoint_is_understood(tmp_path):
    run = tmp_path / "run"
    checkpoints = make_steps(run, 1, 2, 3)
    layout.set_link(checkpoints, "latest", 2)
    layout.set_link(checkpoints, "best", 1)
    spellings = {
        run: 2,
        checkpoints: 2,
        checkpoints / "latest": 2,
        run / "latest": 2,
        run / "best": 1,
        checkpoints / "step_00000003": 3,
        run / "step_00000003": 3,
    }
    for path, step in spellings.items():
        assert layout.resolve_checkpoint(path) == (checkpoints / layout.step_name(step)).resolve(), path


def test_a_link_that_points_nowhere_is_passed_over(tmp_path):
    checkpoints = make_steps(tmp_path, 4)
    layout.set_link(checkpoints, "latest", 9)
    assert layout.linked_step(checkpoints, "latest") is None
    assert layout.resolve_checkpoint(tmp_path).name == "step_00000004"


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("run/step_00000009", "has latest, step_00000004"),
        ("run/best", "has latest, step_00000004"),
        ("nowhere", "no such folder"),
        ("empty", "holds no checkpoint"),
    ],
)
def test_what_is_there_is_said_where_the_argument_is_wrong(tmp_path, argument, said):
    layout.set_link(make_steps(tmp_path / "run", 4), "latest", 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=said):
        layout.resolve_checkpoint(tmp_path / argument)
