"""``launch/evaluate.py --env`` as a user calls it."""

import json
import sys

import pytest

from recap_ds.cli import evaluate
from tests.cli.test_label import one_line
from tests.cli.test_train import launch
from tests.distributed.harness import REPOSITORY
from tests.rollout.made_policy import save_policy


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("evaluate_cli") / "export")


def test_rollouts_are_printed_and_written(export, tmp_path):
    out = tmp_path / "r" / "e.json"
    arguments = ["--checkpoint", str(export), "--env", "reach", "--episodes", "3", "--out", str(out)]
    call = [sys.executable, str(REPOSITORY / "launch" / "evaluate.py"), *arguments, "evaluation.num_videos=1"]
    done = launch(call, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "reach: 3 episodes from seed 1000" in done.stdout and "positive beta 1" in done.stdout
    results = json.loads(out.read_text())
    assert results["dataset_path"] is None and results["dataset_evaluation"] is None
    (entry,) = results["rollouts"]["entries"]
    assert entry["checkpoint"] == str(export) and [e["episode"] for e in entry["episodes"]] == [0, 1, 2]
    assert (tmp_path / "r" / entry["episodes"][0]["video"]).stat().st_size > 1000
    assert json.loads((tmp_path / "r" / "eval_info.json").read_text())["overall"]["n_episodes"] == 3


def test_wrong_calls_end_in_one_line(export, tmp_path, capsys):
    here = ["--checkpoint", str(export)]
    for arguments, said in (
        (here, "give --shards, --env or both"),
        ([*here, "--shards", "x", "--episodes", "3"], "--episodes needs --env"),
        ([*here, "--shards", "x", "--compare", "y"], "--compare needs --env"),
        ([*here, "--shards", "x", "--critic", "y"], "--critic needs --env"),
        ([*here, "--shards", "x", "--out", "there/"], "--out there/: names the JSON file, such as there/results.json"),
        ([*here, "--env", "reach", "--episodes", "0"], "'0' is not a whole number of at least 1"),
        ([*here, "--env", "reaches"], "--env reaches: unknown"),
        ([*here, "--env", "reach", "--compare", str(tmp_path)], str(tmp_path)),
        ([*here, "--env", "reach", "evaluation.indicators=[good]"], "evaluation.indicators"),
        ([*here, "--env", "reach", "evaluation.guidance_betas=[]"], "evaluation.guidance_betas"),
        ([*here, "--env", "reach", "evaluation.num_videos=1", "--out", "/proc/none/e.json"], "--out /proc/none/e.json"),
    ):
        assert evaluate.main(arguments) == 2
        assert said in one_line(capsys)
