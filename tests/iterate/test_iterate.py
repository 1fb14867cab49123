"""Iterations driven through a fake launcher: the order of jobs, what each is told, and going on after any failure."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from recap_ds.cli import iterate as cli_iterate
from recap_ds.cli.main import main
from recap_ds.iterate import driver, folder, program
from recap_ds.iterate.recipe import load_iteration_recipe
from tests.said import one_line

REPOSITORY = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake_launcher.py")
JOBS = ("critic", "label", "policy")


class Desk:
    """A working folder with two rounds of shards, recipes, pre-trained runs and a fake launcher."""

    def __init__(self, folder):
        self.folder, self.journal = folder, folder / "journal"
        self.recipe = folder / "iterations.yaml"
        self.values = {
            "name": "mw",
            "shards": ["data/one", "data/two"],
            "critic": {"recipe": "critic.yaml", "start_from": "runs/v_pre"},
            "label": {"settings": ["label.lookahead=20"]},
            "policy": {"recipe": "policy.yaml", "start_from": "runs/pi_pre", "settings": ["training.seed=3"]},
        }
        for name in ("critic", "policy"):
            shutil.copy(REPOSITORY / "launch" / "recipes" / f"metaworld_{name}.yaml", folder / f"{name}.yaml")
        shutil.copytree(REPOSITORY / "ds_configs", folder / "ds_configs")
        for script in ("train.py", "label.py", "evaluate.py"):
            (folder / "launch").mkdir(exist_ok=True)
            (folder / "launch" / script).touch()
        for shards in self.values["shards"]:
            (folder / shards).mkdir(parents=True)
            (folder / shards / "manifest.json").write_text("{}")
        for run in ("v_pre", "pi_pre"):
            self.add_checkpoint(run, 100)

    def add_checkpoint(self, run, step):
        checkpoints = self.folder / "runs" / run / "checkpoints"
        (checkpoints / f"step_{step:08d}").mkdir(parents=True)
        (checkpoints / "latest").unlink(missing_ok=True)
        (checkpoints / "latest").symlink_to(f"step_{step:08d}")

    def iterate(self, *arguments):
        self.recipe.write_text(yaml.safe_dump(self.values))
        launcher = f"{sys.executable} {FAKE} {self.journal}"
        return main(["iterate", "--config", str(self.recipe), "--launcher", launcher, *arguments])

    def commands(self):
        """What was started since the last look."""
        lines = self.journal.read_text().splitlines() if self.journal.is_file() else []
        self.journal.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def jobs(self):
        return [job_of(command) for command in self.commands()]


def job_of(command):
    if command[0] == "label.py":
        return f"label {command[command.index('--tag') + 1]}"
    if command[0] == "evaluate.py":
        return f"evaluate {Path(command[command.index('--out') + 1]).parent.name}"
    settings = settings_of(command)
    return f"{settings['name']} {Path(settings['runs_dir']).name}"


def settings_of(command):
    return dict(text.split("=", 1) for text in command if "=" in text)


ALL_JOBS = [
    "critic iteration_01",
    "label mw-01",
    "policy iteration_01",
    "critic iteration_02",
    "label mw-02",
    "policy iteration_02",
]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path)


def test_every_iteration_trains_a_critic_labels_and_trains_a_policy(desk, capsys):
    assert desk.iterate() == 0
    commands = desk.commands()
    assert [job_of(command) for command in commands] == ALL_JOBS
    critic, label, policy = commands[3:]
    assert critic[:5] == ["train.py", "--deepspeed", "ds_configs/zero3.json", "--config", "critic.yaml"]
    folder = Path("iterations/mw/iteration_02")
    assert settings_of(critic) == {
        "name": "critic",
        "runs_dir": str(folder),
        "data.shards": str(folder / "shards"),
        "training.stage": "critic",
        "training.start_from": str(desk.folder / "runs/v_pre/checkpoints/step_00000100"),
        "training.resume": "auto",
    }
    assert label[1:] == [
        *("--checkpoint", str(folder / "critic/checkpoints/best"), "--shards", str(folder / "shards")),
        *("--tag", "mw-02", "label.lookahead=20"),
    ]
    said = settings_of(policy)
    assert (said["data.labels"], said["training.stage"], said["training.seed"]) == ("mw-02", "policy", "3")
    # Not the policy of iteration 1.
    assert said["training.start_from"] == str(desk.folder / "runs/pi_pre/checkpoints/step_00000100")
    assert f"recap-ds consolidate {folder / 'policy'} exports/mw" in capsys.readouterr().out


def test_an_iterations_folder_links_to_what_it_used_and_can_move_with_it(desk):
    assert desk.iterate("--iterations", "1") == 0
    folder = Path("iterations/mw/iteration_01")
    links = {path.name: os.readlink(path) for path in folder.iterdir() if path.is_symlink()}
    assert links == {
        "shards": "../../../data/one",
        "critic_start": "../../../runs/v_pre/checkpoints/step_00000100",
        "policy_start": "../../../runs/pi_pre/checkpoints/step_00000100",
        "labels": "../../../data/one/labels/mw-01",
    }
    assert all((folder / name).exists() for name in links)
    record = json.loads((folder / "iteration.json").read_text())
    assert (record["tag"], record["critic"]["step"], record["policy"]["run"]) == ("mw-01", 7, str(folder / "policy"))


@pytest.mark.parametrize("failing", JOBS)
def test_an_iteration_goes_on_with_the_job_that_failed(desk, failing, capsys):
    Path(f"{desk.journal}.fail").write_text(failing)
    assert desk.iterate() == 1
    assert "exit code 1" in one_line(capsys) and JOBS.index(failing) + 1 == len(desk.commands())
    assert desk.iterate() == 0
    assert desk.jobs() == ALL_JOBS[JOBS.index(failing) :]
    assert desk.iterate() == 0
    assert desk.jobs() == [], "all is done"


def test_a_later_round_of_shards_is_one_more_iteration(desk):
    desk.values["shards"] = ["data/one"]
    assert desk.iterate() == 0
    desk.values["shards"] = ["data/one", "data/two"]
    # Meanwhile pre-training went on: iteration 1 stays with what it began at, iteration 2 takes what is named now.
    desk.add_checkpoint("v_pre", 200)
    desk.commands()
    assert desk.iterate() == 0
    (critic, *_) = commands = desk.commands()
    assert [job_of(command) for command in commands] == ALL_JOBS[3:]
    assert settings_of(critic)["training.start_from"].endswith("v_pre/checkpoints/step_00000200")
    assert os.readlink("iterations/mw/iteration_01/critic_start").endswith("step_00000100")


def test_in_a_simulator_an_iteration_ends_with_rollouts_and_the_next_begins_with_some(desk, capsys, monkeypatch):
    desk.values |= {"shards": ["data/one"], "env": {"name": "reach", "settings": ["env.image_size=32"]}}
    desk.values |= {"collect": {"episodes": 6, "corrections": 2}, "evaluate": {"episodes": 4}}
    collections, merges = [], []

    def run(what, command):
        if "collect" in command:
            collections.append(command[command.index("collect") + 1 :])
        else:
            assert subprocess.run(command).returncode == 0

    def merge(folders, out):
        merges.append([str(folder.relative_to(desk.folder) if folder.is_absolute() else folder) for folder in folders])
        out.mkdir(parents=True)
        (out / "manifest.json").write_text("{}")

    monkeypatch.setattr(driver, "_run", run)
    monkeypatch.setattr(driver, "merge_shards", merge)
    monkeypatch.setattr(cli_iterate, "_write_report", lambda name, out, policies, results: None)
    assert desk.iterate("--iterations", "2") == 0
    first, second = (Path(f"iterations/mw/iteration_0{number}") for number in (1, 2))
    assert desk.jobs() == [
        *ALL_JOBS[:3],
        "evaluate iteration_01",
        *ALL_JOBS[3:],
        "evaluate iteration_02",
    ]
    assert collections == [
        [
            *("--env", "reach", "--checkpoint", str(first / "policy"), "--out", str(second / "collected")),
            *("--episodes", "6", "--corrections", "2", "--name", "mw_iteration_02", "env.image_size=32"),
        ]
    ]
    assert merges == [["data/one", str(second / "collected")]]
    assert os.readlink(second / "shards") == "data"
    line = "positive beta 1      success 0.75 [0.30, 0.95]  120 per hour [60, 160]"
    assert f"iteration 1  {line}\niteration 2  {line}\n" in capsys.readouterr().out
    assert desk.iterate("--iterations", "2") == 0
    assert desk.jobs() == [] and len(collections) == 1, "all is done"
    (first / "evaluation_results.json").write_text("{")
    assert desk.iterate("--iterations", "2") == 2
    assert "iteration_01/evaluation_results.json: cannot be read" in one_line(capsys)


def test_an_evaluation_that_was_asked_for_otherwise_is_made_again(desk, monkeypatch, capsys):
    monkeypatch.setattr(cli_iterate, "_write_report", lambda name, out, policies, results: None)

    def jobs(**values):
        desk.values |= values
        assert desk.iterate("--iterations", "1") == 0
        return desk.jobs()

    assert jobs() == ALL_JOBS[:3]
    again = ["evaluate iteration_01"]
    assert jobs(env={"name": "reach"}, evaluate={"episodes": 4}) == again
    assert jobs() == []
    assert jobs(evaluate={"episodes": 4, "settings": ["evaluation.guidance_betas=[1.0,2.0]"]}) == again
    assert "of another policy or other settings; it is made again" in capsys.readouterr().out
    assert jobs(env={"name": "reach", "settings": ["env.image_size=32"]}) == again
    assert jobs() == []
    Path("iterations/mw/iteration_01/policy/summary.json").write_text('{"step": 8}')
    assert jobs() == again, "the policy was trained anew"
    Path("iterations/mw/iteration_01/iteration.json").write_text("{")
    assert jobs() == again


def test_collection_is_compared_once_something_was_collected(desk, capsys):
    assert desk.iterate() == 0
    desk.values |= {"env": {"name": "reach"}, "collect": {"episodes": 4}}
    assert desk.iterate() == 0
    Path("iterations/mw/iteration_03/collected").mkdir(parents=True)
    desk.values["env"], desk.values["collect"] = {"name": "pusht"}, {"episodes": 5}
    assert desk.iterate() == 2
    assert "other settings: collect.episodes, env.name; choose another --out" in one_line(capsys)


def test_without_a_start_the_recipe_decides(desk):
    del desk.values["critic"]["start_from"]
    assert desk.iterate("--iterations", "1", "--out", "elsewhere") == 0
    assert settings_of(desk.commands()[0])["training.start_from"] == "null"
    assert not Path("elsewhere/iteration_01/critic_start").is_symlink()


def test_other_settings_need_another_folder(desk, capsys):
    assert desk.iterate("--iterations", "1") == 0
    desk.values["policy"]["settings"] = ["training.seed=4", "logging.every_steps=5", "data.num_workers=0"]
    desk.values["label"]["settings"] = ["label.lookahead=30"]
    desk.values["critic"]["start_from"] = "runs/pi_pre"
    assert desk.iterate() == 2
    assert one_line(capsys) == (
        "error: iterations/mw holds iterations with other settings: critic_start, label, policy.training.seed; "
        "choose another --out"
    )
    desk.values["name"] = "other"
    assert desk.iterate("--iterations", "1") == 0


def test_iterations_learn_alike_in_batches_gate_arithmetic_and_from_data_that_stay(desk, capsys, monkeypatch):
    def load(shards):
        return SimpleNamespace(content_hash=(Path(shards) / "manifest.json").read_text)

    monkeypatch.setattr(folder, "Manifest", SimpleNamespace(load=load))
    assert desk.iterate("--iterations", "1") == 0
    desk.commands()
    facts = {"global_batch": 32, "manifest_hash": "{}"}
    Path("iterations/mw/iteration_01/critic/run.json").write_text(json.dumps(facts))
    settings, other = Path("ds_configs/zero3.json"), ["evaluation.gate=mae", "training.global_batch_size=64"]
    ds = json.loads(settings.read_text())
    settings.write_text(json.dumps(ds | {"bf16": {"enabled": False}}))
    desk.values["critic"]["settings"] = [*other, "evaluation.num_videos=0"]
    assert desk.iterate() == 2
    assert one_line(capsys) == (
        "error: iterations/mw holds iterations with other settings: critic.evaluation.gate, deepspeed.bf16.enabled, "
        "critic.training.global_batch_size (32 -> 64); choose another --out"
    )
    # Where and how fast is free: the batch stays, whatever a rank has of it.
    settings.write_text(json.dumps(ds | {"zero_optimization": {"stage": 2}}))
    desk.values["critic"]["settings"] = ["training.batch_size=4"]
    assert desk.iterate() == 0
    critic, _, policy = desk.commands()
    assert settings_of(critic)["training.global_batch_size"] == "32"
    assert "training.global_batch_size" not in settings_of(policy)
    Path("data/one/manifest.json").write_text("{ }")
    assert desk.iterate() == 2
    assert "data/one: holds other data than iterations/mw/iteration_01/critic began with" in one_line(capsys)


def test_settings_that_were_cut_off_end_in_one_line(desk, capsys):
    assert desk.iterate("--iterations", "1") == 0
    path = Path("iterations/mw/settings.json")
    path.write_text(path.read_text()[:99])
    assert desk.iterate() == 2
    assert "iterations/mw/settings.json: is cut off or not JSON; remove it if" in one_line(capsys)


def test_labels_of_another_critic_are_in_the_way_before_a_new_one_trains(desk, capsys):
    assert desk.iterate() == 0
    desk.commands()
    assert desk.iterate("--out", "again") == 2
    assert "data/one/labels/mw-01: is there already" in one_line(capsys)
    shutil.rmtree("data/one/labels")
    assert desk.iterate("--out", "again") == 2
    assert "data/two/labels/mw-02: is there already" in one_line(capsys)
    assert desk.jobs() == []
    assert not Path("again").exists()


def test_a_warning_from_the_scheduler_reaches_the_job_and_the_driver_ends_after_it(desk):
    desk.recipe.write_text(yaml.safe_dump(desk.values))
    Path(f"{desk.journal}.wait").touch()
    launcher = f"{sys.executable} {FAKE} {desk.journal}"
    command = [sys.executable, "-m", "recap_ds.cli.main", "iterate", "--config", str(desk.recipe)]
    with subprocess.Popen([*command, "--launcher", launcher], stderr=subprocess.PIPE, text=True) as driver:
        while not desk.journal.is_file():
            assert driver.poll() is None
            time.sleep(0.05)
        driver.terminate()
        _, said = driver.communicate(timeout=60)
    assert driver.returncode == 75
    assert "iteration 1: critic was stopped; the same command goes on" in said and "Traceback" not in said
    Path(f"{desk.journal}.wait").unlink()
    desk.commands()
    assert desk.iterate() == 0
    assert desk.jobs() == ALL_JOBS


@pytest.mark.parametrize("job", ["saves", "dies", "launches"])
def test_ctrl_c_at_the_driver_alone_reaches_the_job(desk, capsys, monkeypatch, job):
    """Which may be a rank below its launcher: the signal would end that one, and nothing be saved."""
    monkeypatch.setattr(program, "GRACE_SECONDS", 0.05)
    Path(f"{desk.journal}.wait").write_text(job)

    def interrupt():
        while not desk.journal.is_file():
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which may be ignored here
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        assert desk.iterate() == 75
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert said == "iteration 1: critic was stopped; the same command goes on from there\n"
    assert Path(f"{desk.journal}.saved").is_file() == (job != "dies")


def test_a_folder_of_shards_that_changed_its_place_is_refused(desk, capsys):
    assert desk.iterate("--iterations", "1") == 0
    desk.values["shards"] = ["data/two"]
    assert desk.iterate() == 2
    assert "iteration_01/shards points at ../../../data/one" in one_line(capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shards": ["data/three"]}, "shards: data/three has no manifest.json"),
        ({"shards": []}, "shards: "),
        ({"name": "a b"}, "name: "),
        ({"critics": {}}, "unknown key 'critics'; did you mean 'critic'?"),
        ({"deepspeed": "none.json"}, "deepspeed: there is no file none.json"),
        ({"critic": {"recipe": "none.yaml"}}, "critic: --config none.yaml: cannot be read"),
        ({"critic": {"recipe": "critic.yaml", "settings": ["training.lr=1"]}}, "critic: the command line: unknown key"),
        ({"critic": {"recipe": "critic.yaml", "settings": ["name=x"]}}, "critic.settings: leave out 'name=x'"),
        ({"critic": {"recipe": "critic.yaml", "start_from": "runs/none"}}, "critic: CHECKPOINT runs/none: there is no"),
        ({"policy": {"recipe": "critic.yaml"}}, "policy: "),
        ({"policy": {}}, "'policy.recipe' is missing"),
        ({"label": {"settings": ["label.lookahed=5"]}}, "did you mean 'label.lookahead'?"),
        ({"label": {"settings": ["training.seed=1"]}}, "label: training.seed: is settled by the critic"),
        ({"label": {"settings": ["recap.demos=labelled"]}}, "label: recap.demos is labelled for the labels and pos"),
        ({"label": {"settings": ["label.source=iql"]}}, "label: label.source=iql is not to be had"),
        ({"collect": {"episodes": 4}}, "collect: needs an environment; add env: {name: ...}"),
        ({"evaluate": {"episodes": 0}}, "evaluate.episodes: "),
        ({"env": {"name": "reach", "settings": ["env.max_step=5"]}}, "did you mean 'env.max_steps'?"),
        ({"evaluate": {"episode": 4}}, "unknown key 'evaluate.episode'; did you mean 'episodes'?"),
        ({"env": {"nme": "reach"}}, "unknown key 'env.nme'; did you mean 'name'?"),
        ({"label": {"setting": []}}, "unknown key 'label.setting'; did you mean 'settings'?"),
        ({"shards": ["data/one", "data/../data/one"]}, "shards: data/../data/one is there twice"),
        ({"deepspeed": "critic.yaml"}, "deepspeed: critic.yaml cannot be read, or holds no JSON object"),
        ({"collect": {"episodes": 4, "correction": 2}}, "unknown key 'collect.correction'; did you mean 'correct"),
    ],
)
def test_a_wrong_recipe_ends_in_one_line_before_anything_runs(desk, change, said, capsys):
    desk.values |= change
    assert desk.iterate() == 2
    assert said in one_line(capsys)
    assert desk.jobs() == []
    assert not Path("iterations").exists()


def test_wrong_flags_end_in_one_line(desk, capsys):
    assert desk.iterate("--iterations", "3") == 2
    assert "--iterations 3: the recipe names 2 folder(s)" in one_line(capsys)
    for flags, said in (
        (["--iterations", "0"], "'0' is not a whole number"),
        (["--programs", "nowhere"], "nowhere: has no train.py"),
        (["--launcher", "no-such-launcher -x"], "there is no program 'no-such-launcher'"),
        (["--launcher", ""], "there is no program ''"),
    ):
        assert desk.iterate(*flags) == 2
        assert said in one_line(capsys)
    assert desk.jobs() == []


def test_the_shipped_recipe_holds_together(monkeypatch, tmp_path):
    path = REPOSITORY / "launch" / "recipes" / "iterations" / "metaworld.yaml"
    (shards,) = yaml.safe_load(path.read_text())["shards"]
    for name in ("launch", "ds_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / shards).mkdir(parents=True)
    (tmp_path / shards / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    recipe = load_iteration_recipe(path)
    critic, policy = recipe.critic_config(), recipe.policy_config()
    assert (critic.training.stage, policy.training.stage) == ("critic", "policy")
    for key in ("max_action_dim", "max_state_dim", "chunk_size"):
        assert getattr(critic, key) == getattr(policy, key)
