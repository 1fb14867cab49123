"""A study driven through fake programs: what runs, what is written down, and going on after anything."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from recap_ds.errors import UsageError
from recap_ds.files.lock import exclusive
from recap_ds.files.records import write_checked_json
from recap_ds.study import driver, unit
from recap_ds.study.folder import claim_study, mark_whole
from recap_ds.study.programs import Crew
from recap_ds.study.reading import load_study_recipe
from recap_ds.study.results import StudyResults
from tests.said import one_line
from tests.study.conftest import PROGRAMS, write_manifest


class Child:
    """A process that notes what it is sent."""

    def __init__(self, told, name):
        self.send_signal = lambda number: told.append((name, number))


def unit_jobs(*names):
    return [f"{job} {name}" for name in names for job in ("policy", "evaluate")]


ALL_JOBS = ["pretrain toy", *unit_jobs("plain-seed0", "plain-seed1", "guided-seed1")]


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
    desk.values["arms"]["stronger"] = desk.values["arms"]["strong"]
    (desk.out / "plain-seed0" / "policy" / "summary.json").unlink()
    assert desk.study() == 1
    assert "stronger-seed0: needs studies/toy/plain-seed0/policy, which is not there; give the --out" in one_line(
        capsys
    )


def test_a_further_round_is_collected_by_the_policy_of_another_arm_and_joins_the_data(desk, verbs, monkeypatch):
    desk.values |= {"seeds": [4], "env_settings": ["env.image_size=32"]}
    after = {"by": "plain", "guidance_beta": 1.5, "collect": {"episodes": 6, "corrections": 2}}
    desk.values["arms"] = {"plain": {"method": "imitation"}, "next": {"method": "imitation", "after": after}}
    merges = []

    def merge(folders, out):
        merges.append([*map(str, folders), str(out)])
        write_manifest(out, "merged")

    monkeypatch.setattr(unit, "merge_shards", merge)
    assert desk.study() == 0
    folder = "studies/toy/next-seed4"
    assert verbs[1:] == [
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
    assert desk.study() == 0 and (len(verbs), len(merges)) == (2, 1), "what is there is not collected again"


def test_a_unit_that_failed_in_the_middle_goes_on_with_the_job_that_failed(desk, capsys):
    Path("fail").write_text("studies/toy/plain-seed1/policy")
    assert desk.study() == 1
    said = one_line(capsys)
    assert "studies/toy/plain-seed1/policy: training ended with exit code 1: nothing works (all of it in" in said
    assert desk.jobs() == ALL_JOBS[:4]
    desk.out.joinpath("plain-seed1", "evaluation_results.json").unlink(missing_ok=True)
    assert desk.study() == 0
    assert desk.jobs() == ALL_JOBS[3:]


def test_a_unit_waits_for_the_one_it_needs_and_rather_runs_beside_others_than_waits_for_their_critic(desk):
    collect = {"episodes": 6}
    desk.values["seeds"], desk.values["critic_seed"] = [0, 1], 9
    desk.values["arms"] = {
        "recap": {"method": "recap", "seeds": [0]},
        "other": {"method": "recap"},
        "next": {"method": "imitation", "after": {"by": "other", "collect": collect}},
        "judge": {"method": "recap", "policy_of": "recap", "seeds": [0]},
    }
    desk.words()
    recipe = load_study_recipe(desk.recipe)
    done, running, order = set(), [], []
    results = SimpleNamespace(has=lambda unit: unit in done)

    def begin():
        queue = [unit for unit in recipe.units() if unit not in done and unit not in running]
        unit = driver._next(queue, running, recipe, results)
        order.append(unit and unit.name)
        if unit is not None:
            running.append(unit)

    def finish():
        done.add(running.pop(0))

    begin(), begin(), finish()
    begin(), begin(), finish()
    begin(), begin()
    assert order == ["recap-seed0", "other-seed0", "judge-seed0", "other-seed1", "next-seed0", None]


def test_children_are_told_once_whichever_signals_come(desk, monkeypatch):
    told = []
    monkeypatch.setattr(os, "write", lambda number, text: told.append(text.decode()))
    crew = Crew(PROGRAMS, 2)
    crew._running = {Child(told, "a"), Child(told, "b")}
    crew.stop_at_signal(tell=False)
    crew.stop()
    (line,) = told
    assert line == f"stopping: what runs saves first; if it does not hear of it: kill {os.getpid()}\n"
    for _ in range(2):
        crew.stop_at_signal()
    assert sorted(told[1:]) == [("a", signal.SIGTERM), ("b", signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_study_that_is_stopped_or_killed_in_a_unit_goes_on_with_it(desk, number):
    desk.values["seeds"] = [0]
    desk.words()
    claim_study(desk.out, load_study_recipe(desk.recipe), ())
    write_manifest(desk.out / "data", "")
    mark_whole(desk.out / "data")
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
    twice = json.loads(whole)
    del twice["sha256"]
    twice["units"].append(twice["units"][0])
    write_checked_json(desk.results, twice)
    assert desk.study() == 2
    assert "study.json: is not a study's results (ValueError: it holds a unit twice)" in one_line(capsys)
    desk.results.write_text(whole)
    results = StudyResults.open(desk.results, load_study_recipe(desk.recipe))
    with pytest.raises(UsageError, match="holds plain-seed0 already"):
        results.add(results.units[0], {})
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
        "give the recipe they were made with, or another --out and another --results"
    ) in one_line(capsys)
    assert desk.jobs() == []


def test_two_studies_do_not_write_into_one_results_file(desk, capsys):
    with exclusive(desk.results.with_name(".study.json.lock"), "x", print):
        assert desk.study("--out", "elsewhere") == 2
        assert "--results " in (said := one_line(capsys)) and "study.json: another process works on it (host" in said
        assert desk.study("--table") == 0
    assert desk.jobs() == []


def test_the_table_is_of_the_recipes_units_and_against_its_first_arm(desk, capsys):
    assert desk.study() == 0
    desk.values["seeds"] = [1]
    capsys.readouterr()
    assert desk.study("--table") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| plain |")]
    assert [row.split("|")[6].strip() for row in rows] == ["0.50"], "seed 0 is not the recipe's any more"
    desk.values["arms"] = {"new": {"method": "imitation"}, **desk.values["arms"]}
    assert desk.study("--table") == 0
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert header.endswith("| against new |") and len(rows) == 3 and all(row.endswith("|  |") for row in rows)
    desk.values["seeds"], desk.values["arms"]["guided"]["seeds"] = [7], [7]
    assert desk.study("--table") == 0
    assert "no unit is done" in capsys.readouterr().out


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
