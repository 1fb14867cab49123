"""A study driven through fake programs: what runs, what is written down, and going on after anything."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from recap_ds.cli.main import main
from recap_ds.files.records import write_checked_json
from recap_ds.study import unit
from recap_ds.study.programs import Crew
from tests.distributed.harness import REPOSITORY
from tests.said import one_line

PROGRAMS = Path(__file__).with_name("programs")
POLICY = {"max_action_dim": 2, "max_state_dim": 4, "model": {"vlm_model_name": "tiny"}, "training": {"stage": "policy"}}
CRITIC = {**POLICY, "value": {"critic": "distributional"}, "training": {"stage": "critic"}}


class Desk:
    """A working folder with a study's recipe; its data are whole already."""

    def __init__(self, folder):
        self.recipe, self.results = folder / "study.yaml", folder / "study.json"
        self.values = {
            "name": "toy",
            "env": "reach",
            "data": {"episodes": 4},
            "pretrain": {"recipe": "policy.yaml"},
            "critic": {"recipe": "critic.yaml"},
            "policy": {"recipe": "policy.yaml", "settings": ["training.weight_decay=0.2"]},
            "evaluation": {"episodes": 8},
            "seeds": [0, 1],
            "arms": {
                "plain": {"method": "imitation"},
                "guided": {"method": "imitation", "settings": ["data.auto_episodes=successful"], "seeds": [1]},
            },
        }
        self.values["arms"]["guided"]["guidance_betas"] = [1.0, 2.0]
        for name, values in (("policy", {**POLICY, "recap": {"sft": True}}), ("critic", CRITIC)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
        (folder / "ds_configs").symlink_to(REPOSITORY / "ds_configs")
        self.out = folder / "studies" / "toy"
        self.out.mkdir(parents=True)
        data = {"episodes": 4, "corrections": None, "demos": None, "settings": []}
        (self.out / "data.json").write_text(json.dumps(data))

    def words(self, *flags):
        self.recipe.write_text(yaml.safe_dump(self.values, sort_keys=False))
        return ["study", "--config", str(self.recipe), "--programs", str(PROGRAMS), *flags]

    def study(self, *flags):
        return main(self.words(*flags))

    def jobs(self):
        """What was started since the last look, by the run or the results it is of."""
        journal = Path("journal")
        lines = journal.read_text().splitlines() if journal.is_file() else []
        journal.unlink(missing_ok=True)
        return [_job(*json.loads(line)) for line in lines]


def _job(program, *arguments):
    if program == "evaluate":
        return f"evaluate {Path(arguments[arguments.index('--out') + 1]).parent.name}"
    settings = dict(word.split("=", 1) for word in arguments if "=" in word)
    return f"{settings['name']} {Path(settings['runs_dir']).name}"


def unit_jobs(*names):
    return [f"{job} {name}" for name in names for job in ("policy", "evaluate")]


ALL_JOBS = ["pretrain toy", *unit_jobs("plain-seed0", "plain-seed1", "guided-seed1")]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path)


def test_every_unit_runs_once_and_a_longer_recipe_goes_on(desk, capsys):
    assert desk.study() == 0
    assert desk.jobs() == ALL_JOBS
    (plain, first, second) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    # 16 episodes, half of them won, the won ones of 10 + 0, 2, 4, 6 frames and the lost of 10 + 1, 3, 5, 7 at 10 fps.
    assert "| 0.50 [0.28, 0.72] | 0.50, 0.50 | 1333 [" in plain and plain.endswith("|  |")
    assert first.startswith("| guided | 1 | 0.50 [0.15, 0.85] | 0.50 [0.15, 0.85] | 0.50 [0.22, 0.78] | 0.50 |")
    assert second.startswith("| guided | 2 |") and second.endswith("| 0 won, 0 lost, p = 1 |")
    assert desk.study() == 0 and desk.jobs() == [], "all is done"
    desk.values["seeds"] = [0, 1, 2]
    assert desk.study("--table") == 0 and desk.jobs() == []
    assert "not run yet: plain-seed2" in capsys.readouterr().out
    assert desk.study("--jobs", "2") == 0
    assert desk.jobs() == unit_jobs("plain-seed2")
    assert len(json.loads(desk.results.read_text())["units"]) == 4
    page = (desk.out / "report.html").read_text()
    assert (
        "guided, guidance 2 succeeds in 0.50 [0.22, 0.78] of 8 episodes, not clearly otherwise than plain with 0.50 "
        "[0.31, 0.69]."
    ) in page
    assert "Success rate: a" in page and "Not run yet" not in page
    picture = ElementTree.parse(desk.results.with_suffix(".svg")).getroot()
    success, per_hour = (chart.attrib["aria-label"] for chart in picture.findall("{*}svg"))
    (words,) = success.split(". plain: ")[1:]
    assert words.startswith("12 of 24 0.50, 95 % between 0.31 and 0.69. guided (1): 4 of 8")
    assert per_hour.startswith("Successes per hour. plain:  1,333, 95 % between ")


def test_a_policy_is_told_its_arm_and_seed(desk):
    assert desk.study() == 0
    commands = [json.loads(line) for line in Path("journal").read_text().splitlines()]
    train, evaluate = commands[-2:]
    folder = Path("studies/toy/guided-seed1")
    assert train[1:5] == ["--deepspeed", "ds_configs/zero3.json", "--config", "policy.yaml"]
    assert dict(word.split("=", 1) for word in train if "=" in word) == {
        "training.weight_decay": "0.2",
        "data.auto_episodes": "successful",
        "training.stage": "policy",
        "recap.sft": "true",
        "training.seed": "1",
        "training.start_from": "studies/toy/pretrain",
        "name": "policy",
        "runs_dir": str(folder),
        "data.shards": "studies/toy/data",
        "training.resume": "auto",
    }
    assert evaluate[1:3] == ["--checkpoint", str(folder / "policy")]
    # Seed 1 plays the scenes after the eight of seed 0.
    assert evaluate[-3:] == [
        "evaluation.rollout_seed=1008",
        "evaluation.indicators=[positive]",
        "evaluation.guidance_betas=[1.0,2.0]",
    ]


def test_what_runs_alone_gets_all_cores_and_what_runs_side_by_side_its_share(desk, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert desk.study("--jobs", "3") == 0
    runs = ("pretrain", "plain-seed0/policy", "guided-seed1/policy")
    summaries = [json.loads((desk.out / run / "summary.json").read_text()) for run in runs]
    assert [summary["threads"] for summary in summaries] == ["6", "2", "2"]


def test_an_arm_may_judge_the_policy_of_another_under_other_guidances(desk, capsys):
    desk.values["seeds"] = [0]
    desk.values["arms"] = {
        "plain": {"method": "imitation"},
        "strong": {"method": "imitation", "policy_of": "plain", "guidance_betas": [3.0]},
    }
    assert desk.study() == 0
    assert desk.jobs() == ["pretrain toy", *unit_jobs("plain-seed0"), "evaluate strong-seed0"]
    assert "| strong | 3 |" in capsys.readouterr().out
    desk.results.unlink()
    desk.values["arms"] = {"strong": desk.values["arms"]["strong"], "plain": desk.values["arms"]["plain"]}
    (desk.out / "plain-seed0" / "policy" / "summary.json").unlink()
    assert desk.study() == 1
    assert (
        "strong-seed0: studies/toy/plain-seed0/policy, which it needs, is not trained; run its arm first"
        in one_line(capsys)
    )


def test_a_further_round_is_collected_by_the_policy_of_another_arm_and_joins_the_data(desk, monkeypatch):
    desk.values |= {"seeds": [4], "env_settings": ["env.image_size=32"]}
    after = {"by": "plain", "guidance_beta": 1.5, "collect": {"episodes": 6, "corrections": 2}}
    desk.values["arms"] = {"plain": {"method": "imitation"}, "next": {"method": "imitation", "after": after}}
    verbs, merges = [], []

    def merge(folders, out):
        merges.append([*map(str, folders), str(out)])
        out.mkdir()
        (out / "manifest.json").write_text("{}")

    def verb(crew, what, log, *words):
        log.parent.mkdir()
        verbs.append(list(words))

    monkeypatch.setattr(Crew, "verb", verb)
    monkeypatch.setattr(unit, "merge_shards", merge)
    assert desk.study() == 0
    folder = "studies/toy/next-seed4"
    assert verbs == [
        [
            *("collect", "--env", "reach", "--out", f"{folder}/collected", "--name", "study_plain"),
            *("--episodes", "6", "--corrections", "2"),
            *("--checkpoint", "studies/toy/plain-seed4/policy", "--seed", "4"),
            *("evaluation.indicators=[positive]", "evaluation.guidance_betas=[1.5]", "env.image_size=32"),
        ]
    ]
    assert merges == [["studies/toy/data", f"{folder}/collected", f"{folder}/data"]]
    (train,) = [line for line in Path("journal").read_text().splitlines() if f'"runs_dir={folder}"' in line]
    assert f'"data.shards={folder}/data"' in train and '"training.start_from=studies/toy/pretrain"' in train
    desk.results.unlink()
    assert desk.study() == 0 and len(verbs) == len(merges) == 1, "what is there is not collected again"


def test_a_unit_that_failed_in_the_middle_goes_on_with_the_job_that_failed(desk, capsys):
    Path("fail").write_text("studies/toy/plain-seed1/policy")
    assert desk.study() == 1
    said = one_line(capsys)
    assert "studies/toy/plain-seed1/policy: training ended with exit code 1: nothing works (all of it in" in said
    assert desk.jobs() == ALL_JOBS[:4]
    desk.out.joinpath("plain-seed1", "evaluation_results.json").unlink(missing_ok=True)
    assert desk.study() == 0
    assert desk.jobs() == ALL_JOBS[3:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_study_that_is_stopped_or_killed_in_a_unit_goes_on_with_it(desk, number):
    assert desk.study("--table") == 0
    desk.values["seeds"] = [0]
    Path("wait").touch()
    command = [sys.executable, "-m", "recap_ds.cli.main", *desk.words("--jobs", "2")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as driver:
        while len(list(desk.out.glob("*/waiting"))) < 2:
            assert driver.poll() is None
            time.sleep(0.05)
        if number == signal.SIGTERM:
            driver.terminate()
        else:  # as Ctrl-C in a terminal, and as the end of a machine
            os.killpg(driver.pid, number)
        said, _ = driver.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert driver.returncode == 75 and "was stopped; the same command goes on from there" in said
    assert not list(desk.out.glob("*/lost")), "nobody is told twice"
    Path("wait").unlink()
    desk.jobs()
    assert desk.study() == 0
    assert sorted(desk.jobs()) == sorted(unit_jobs("plain-seed0", "guided-seed1"))


def test_results_that_are_damaged_or_of_another_recipe_are_refused_before_anything_runs(desk, capsys):
    assert desk.study() == 0
    desk.jobs(), capsys.readouterr()
    whole = desk.results.read_text()
    for text, said in (
        (whole[:-100], "study.json: is cut off or not JSON"),
        (whole.replace("1010", "1111", 1), "study.json: was changed or damaged (its checksum differs)"),
        ("{}", "study.json: was not written by recap_ds"),
    ):
        desk.results.write_text(text)
        assert desk.study() == 2
        assert said in one_line(capsys)
    older = json.loads(whole)
    del older["sha256"], older["arms"]["plain"]["policy"]["data"]["auto_episodes"]
    write_checked_json(desk.results, older)
    assert desk.study() == 0, "a key that is newer than the results has the value they were made with"
    desk.results.write_text(whole)
    capsys.readouterr()
    desk.values["evaluation"]["episodes"] = 9
    desk.values["arms"]["plain"]["settings"] = ["training.weight_decay=0.5"]
    assert desk.study() == 2
    assert (
        "study.json: holds results of another recipe: evaluation.episodes, arms.plain.policy.training.weight_decay; "
        "give the recipe they were made with, or another --results"
    ) in one_line(capsys)
    assert desk.jobs() == []


def test_wrong_flags_end_in_one_line(desk, capsys):
    for flags, said in (
        (["--results", "nowhere/study.json"], "--results nowhere/study.json: its folder is not there"),
        (["--results", "ds_configs"], "ds_configs: cannot be read (Is a directory)"),
        (["--programs", "nowhere"], "--programs nowhere: has no train.py"),
        (["--jobs", "0"], "'0' is not a whole number of at least 1"),
        (["--out", "policy.yaml"], "policy.yaml: cannot be written"),
    ):
        assert desk.study(*flags) == 2
        assert said in one_line(capsys)
    assert desk.jobs() == []


def test_an_evaluation_of_other_episodes_is_not_taken_for_this_one(desk, capsys):
    assert desk.study() == 0
    desk.results.unlink()
    desk.values["evaluation"]["episodes"] = 9
    assert desk.study() == 2
    assert (
        "evaluation_results.json: is of another evaluation (8 episodes from seed 1000, guidance 1.0); remove it"
        in one_line(capsys)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arm": {}}, "unknown key 'arm'; did you mean 'arms'?"),
        ({"seeds": []}, "seeds: "),
        ({"policy": {"recipe": "none.yaml"}}, "arms.plain: --config none.yaml: cannot be read"),
        ({"policy": {"recipe": "policy.yaml", "settings": ["training.seed=3"]}}, "leave out 'training.seed=3'"),
        ({"pretrain": {}}, "'pretrain.recipe' is missing"),
        ({"deepspeed": "none.json"}, "deepspeed: there is no file none.json"),
        ({"data": {"episodes": 4, "settings": ["collect.expert_sped=1"]}}, "did you mean 'collect.expert_speed'?"),
        ({"evaluation": {"episodes": 0}}, "evaluation.episodes: "),
        ({"arms": {"a": {"method": "joint"}}}, "arms.a: method joint needs 'joint'"),
        ({"arms": {"a": {"method": "imitation", "labels": ["x=1"]}}}, "arms.a.labels: only method recap reads labels"),
        ({"arms": {"a": {"method": "imitation", "policy_of": "b"}}}, "arms.a.policy_of: there is no arm 'b'"),
        (
            {"arms": {"a": {"method": "recap", "after": {"by": "b", "collect": {"episodes": 1}}}}},
            "arms.a.after.by: there is no arm 'b'",
        ),
        (
            {"arms": {"a": {"method": "recap", "labels": ["recap.demos=labelled"]}}},
            "arms.a: recap.demos is labelled for the labels and positive for the policy",
        ),
    ],
)
def test_a_wrong_recipe_ends_in_one_line_before_anything_runs(desk, change, said, capsys):
    desk.values |= change
    assert desk.study() == 2
    assert said in one_line(capsys)
    assert desk.jobs() == []
