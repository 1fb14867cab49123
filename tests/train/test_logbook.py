"""What a logbook leaves on disk, and where wandb goes. Nothing here needs a network."""

import json
import math
from pathlib import Path

import pytest

from recap_ds.config import LoggingConfig
from recap_ds.errors import UsageError
from recap_ds.files.lines import LineFile
from recap_ds.train.logbook import Logbook, wandb_mode
from recap_ds.train.run_folder import RunFolder
from tests.tiny import tiny_config


def open_folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tiny_config(name="run", runs_dir=str(tmp_path)))
    run.path.mkdir(exist_ok=True)
    return run


def logbook(run: RunFolder, wandb: str = "disabled", is_main: bool = True) -> Logbook:
    return Logbook(run, LoggingConfig(wandb=wandb), 20, {"seed": 3}, is_main)


def lines(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_one_line_of_strict_json_per_write_and_nan_is_null(tmp_path):
    run = open_folder(tmp_path)
    with logbook(run) as book:
        assert book.open(0, None) is None
        book.write(1, {"train/loss": 0.5, "train/q_loss": math.nan})
        assert lines(run) == [{"step": 1, "train/loss": 0.5, "train/q_loss": None}], "a line is there at once"
        book.write(2, {"train/grad_norm": math.inf})
    assert lines(run)[1] == {"step": 2, "train/grad_norm": None}
    assert "NaN" not in run.metrics.read_text() and "Infinity" not in run.metrics.read_text()


def test_a_later_start_appends(tmp_path):
    run = open_folder(tmp_path)
    for step in (1, 2):
        with logbook(run) as book:
            book.open(step - 1, None)
            book.write(step, {"train/loss": float(step)})
    assert [line["step"] for line in lines(run)] == [1, 2]


def test_plain_lines_for_people(tmp_path, capsys):
    with logbook(open_folder(tmp_path)) as book:
        book.open(0, None)
        book.write(7, {"train/loss": 0.25, "train/v_loss": 0.125, "time/samples_per_second": 80.0})
        book.write(7, {"eval/loss": 0.5})
        book.write(8, {"data/samples_seen": 4.0})
        book.tick()
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "step  7/20  train  loss 0.2500  v_loss 0.1250  80.0 samples/s",
        "step  7/20  eval  loss 0.5000",
    ]


def test_other_ranks_are_silent_and_write_nothing(tmp_path, capsys):
    run = open_folder(tmp_path)
    with logbook(run, wandb="online", is_main=False) as book:
        assert book.open(0, "abc") == "abc", "every rank remembers the same id"
        book.write(1, {"train/loss": 1.0})
        book.say("hello")
    assert not list(run.path.iterdir())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, None, "offline"),
        ({"WANDB_API_KEY": "0123"}, None, "online"),
        ({"WANDB_API_KEY": ""}, None, "offline"),
        ({}, "machine api.wandb.ai login user password 0123", "online"),
        ({}, "machine example.org login user password 0123", "offline"),
        ({"WANDB_API_KEY": "0123", "WANDB_MODE": "disabled"}, None, "disabled"),
    ],
)
def test_auto_is_online_where_there_is_an_account(environment, netrc, mode, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if netrc is not None:
        (tmp_path / "netrc").write_text(netrc)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(LoggingConfig(wandb="auto")) == mode
    assert wandb_mode(LoggingConfig(wandb="online")) == "online", "a given mode is the mode"


def test_disabled_writes_no_wandb_folder(tmp_path):
    run = open_folder(tmp_path)
    with logbook(run) as book:
        assert book.open(3, "abc") == "abc"
    assert not (run.path / "wandb").exists()


def test_offline_writes_a_folder_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    run = open_folder(tmp_path)
    with logbook(run, wandb="offline") as book:
        first = book.open(0, None)
        book.write(1, {"train/loss": 1.0})
    assert first
    with logbook(run, wandb="offline") as book:
        assert book.open(1, first) == first
        book.write(2, {"train/loss": 0.5})
    folders = list((run.path / "wandb").glob("offline-run-*"))
    assert folders and all(first in folder.name for folder in folders), "where wandb sync finds them, under one id"
    assert [line["step"] for line in lines(run)] == [1, 2]


def test_a_wandb_that_cannot_be_reached_is_one_clear_line(tmp_path, monkeypatch):
    import wandb

    def unreachable(**_):
        raise wandb.errors.CommError("Run initialization has timed out after 90.0 sec.")

    monkeypatch.setattr(wandb, "init", unreachable)
    with (
        pytest.raises(UsageError, match=r"logging\.wandb: online .*timed out.*set logging\.wandb=offline"),
        logbook(open_folder(tmp_path), wandb="online") as book,
    ):
        book.open(0, None)


class FakeWandb:
    def __init__(self) -> None:
        self.exit_codes: list[int] = []

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


def test_a_run_left_by_an_error_has_failed_in_wandb(tmp_path):
    run, fake = open_folder(tmp_path), FakeWandb()
    with logbook(run) as book:
        book._wandb = fake
    failing = logbook(run)
    failing._wandb = fake
    with pytest.raises(RuntimeError, match="diverged"), failing:
        raise RuntimeError("diverged")
    assert fake.exit_codes == [0, 1]


def test_a_full_disk_is_said_once(tmp_path, capsys, monkeypatch):
    run = open_folder(tmp_path)
    answers = iter(["the disk is full", "the disk is full", None, "the disk is full"])
    monkeypatch.setattr(LineFile, "add", lambda self, line: next(answers))
    with logbook(run) as book:
        book.open(0, None)
        book.write(1, {"train/loss": 1.0})
        book.write(2, {"train/loss": 2.0})
        book.write(3, {"train/loss": 3.0})
        book.write(4, {"train/loss": 4.0})
    warnings = [line for line in capsys.readouterr().err.splitlines() if "full" in line]
    assert warnings == ["warning: the disk is full; its lines are kept until it can be"] * 2
