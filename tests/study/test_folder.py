"""What lies in a study's folder is not taken for another recipe's, nor for what was made of something else."""

import json
import shutil
from pathlib import Path

import pytest

from recap_ds.errors import UsageError
from recap_ds.study.rollouts import read_rollouts
from tests.said import one_line

ANOTHER = "holds runs of another recipe: "


def test_runs_of_another_recipe_are_not_taken_for_this_one(desk, capsys):
    Path("fail").write_text("studies/toy/guided-seed1/policy")
    assert desk.study() == 1, "a unit is half made"
    desk.results.unlink()
    desk.jobs(), capsys.readouterr()
    Path("other.json").write_text('{"zero_optimization": {"stage": 2}}')
    stiff = {"plain": {"method": "imitation", "settings": ["training.weight_decay=0.5"]}}
    mends = "give the recipe they were made with, or another --out and another --results"
    before = desk.values
    for change, said in (
        ({"env": "pusht"}, f"studies/toy: {ANOTHER}env; {mends}"),
        ({"env_settings": ["env.image_size=32"]}, f"{ANOTHER}env_settings.env.image_size; "),
        ({"critic": {"recipe": "critic.yaml", "settings": ["evaluation.gate=nll"]}}, "critic.evaluation.gate; "),
        ({"pretrain": {"recipe": "policy.yaml", "settings": ["max_state_dim=9"]}}, "pretrain.max_state_dim; "),
        ({"deepspeed": "other.json"}, "deepspeed.zero_optimization"),
        ({"arms": stiff}, f"plain-seed0: {ANOTHER}policy.training.weight_decay; {mends}"),
    ):
        desk.values = before | change
        assert desk.study() == 2
        assert said in one_line(capsys) and desk.jobs() == []
    harmless = ["data.num_workers=7", "logging.every_steps=3", "training.weight_decay=0.2"]
    desk.values = before | {"name": "renamed", "policy": {"recipe": "policy.yaml", "settings": harmless}}
    assert desk.study("--out", str(desk.out)) == 0
    assert desk.jobs() == ["policy guided-seed1", "evaluate guided-seed1"], "what changes no result is free"


def test_what_was_made_of_something_that_is_there_no_more_is_not_taken(desk, capsys):
    desk.values["seeds"], desk.values["arms"] = [0], {"plain": {"method": "imitation"}}
    assert desk.study() == 0
    desk.results.unlink()
    for gone, refused in (
        ("plain-seed0/policy", "plain-seed0/evaluation_results.json: was made of another policy than there is now;"),
        ("pretrain", "plain-seed0/policy: was made of another pre-training than there is now; remove it,"),
        ("data", "pretrain: was made of another shards than there is now; remove it,"),
    ):
        shutil.rmtree(desk.out / gone)
        capsys.readouterr()
        assert desk.study() == 2
        assert refused in one_line(capsys)


def test_a_folder_that_does_not_say_whose_it_is_or_is_cut_off_ends_in_one_line(desk, capsys):
    (desk.out / "data").mkdir(parents=True)
    assert desk.study() == 2
    assert "toy/data: is there, but no studies/toy/study.json that says of which recipe;" in one_line(capsys)
    (desk.out / "data").rmdir()
    assert desk.study() == 0
    desk.results.unlink()
    for name in ("data.json", "plain-seed0/policy.sources.json", "plain-seed0/unit.json", "study.json"):
        record = desk.out / name
        whole = record.read_text()
        record.write_text(whole[:20])
        assert desk.study() == 2
        assert f"{name}: is cut off or not JSON; restore it, or give another --out" in one_line(capsys)
        record.write_text(whole)


def whole():
    episodes = [{"task": "a", "success": True, "frames": 3}, {"task": "b", "success": False, "frames": 9}]
    entries = [{"indicator": "positive", "guidance_beta": beta, "episodes": list(episodes)} for beta in (1.0, 2.0)]
    return {"num_episodes": 2, "seed": 5, "fps": 10.0, "entries": entries}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda told: told["entries"][1]["episodes"].pop(),
            "is not whole (1 and 2 of 2 episodes at 10 fps); remove it",
        ),
        (lambda told: told["entries"][0].pop("indicator"), "cannot be read (KeyError: 'indicator'); remove it"),
        (lambda told: told.pop("fps"), "cannot be read (KeyError: 'fps'); remove it"),
        (lambda told: told.update(seed=7), "is of another evaluation (2 episodes from seed 7, guidance 1.0, 2.0);"),
    ],
)
def test_an_evaluation_that_is_not_whole_ends_in_one_line(tmp_path, spoil, said):
    path, told = tmp_path / "results.json", whole()
    path.write_text(json.dumps({"rollouts": told}))
    assert read_rollouts(path, 2, 5, [1.0, 2.0]).entries[1].tasks["b"].num_frames == [9]
    spoil(told)
    path.write_text(json.dumps({"rollouts": told}))
    with pytest.raises(UsageError) as caught:
        read_rollouts(path, 2, 5, [1.0, 2.0])
    assert f"results.json: {said}" in str(caught.value)
