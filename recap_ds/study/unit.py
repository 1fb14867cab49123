"""One unit: an arm's policy under one seed, trained and judged, and what it shares with others of its seed.

    OUT/data  data.json                          the collected shards; the second file says that they are whole
    OUT/pretrain                                 the run that every other one begins with
    OUT/critic0/critic                           the critic of the seed, and of all its arms that read labels
    OUT/ARM-seed0/policy  evaluation_results.json  log.txt
    OUT/ARM-seed0/collected  data  critic        of an arm that comes after another: its own round of data

A job is done when its own summary, labels or results are there, so whatever ends a study, the next start finds out by
looking. Labels lie beside the shards they are of, under critic0 (the critic's) or ARM-seed0 (of other settings).
"""

import json
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recap_ds.checkpoint.layout import best_or_latest
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.label_records import LABELS_NAME
from recap_ds.data.labels import labels_folder, load_label_record
from recap_ds.data.manifest import MANIFEST_NAME
from recap_ds.data.merge import merge_shards
from recap_ds.errors import RunFailed, UsageError
from recap_ds.files.atomic import write_file
from recap_ds.study.programs import Crew
from recap_ds.study.recipe import Arm, Collection, Job, StudyRecipe, Unit, stage_settings
from recap_ds.study.results import Entry, Episodes, UnitResult
from recap_ds.train.gate import GATES
from recap_ds.train.run_folder import RunFolder

# Of all data sets of a study: their scenes follow from it.
DATA_NAME = "study"


class UnitRunner:
    """``out``: the study's folder. Safe to use by several threads: what units share is made once."""

    def __init__(self, recipe: StudyRecipe, out: Path, crew: Crew) -> None:
        self._recipe, self._out, self._crew = recipe, out, crew
        self._locks: dict[Path, threading.Lock] = defaultdict(threading.Lock)

    def prepare(self) -> None:
        """What all units share: data and pre-training."""
        recipe, log = self._recipe, self._out / "log.txt"
        self._collect(self._out / "data", recipe.data, DATA_NAME, log)
        job = Job(recipe=recipe.pretrain.recipe, settings=(*recipe.pretrain.settings, "training.start_from=null"))
        own = ["training.stage=policy", "recap.sft=true"]
        self._train("pretrain", self._out, job, self._out / "data", own, log, alone=True)

    def run(self, unit: Unit) -> UnitResult:
        arm, folder = self._recipe.arms[unit.arm], self._out / unit.name
        log, seconds, notes = folder / "log.txt", {}, {}
        if arm.policy_of is None:
            policy = folder / "policy"
            notes = self._learn(unit, arm, folder, log, seconds)
        else:
            policy = self._trained(unit, arm.policy_of)
        results, seconds["evaluation"] = self._evaluate(unit, arm, policy, folder, log)
        return _result(unit, results, notes, {name: round(value, 1) for name, value in seconds.items()})

    def _learn(self, unit: Unit, arm: Arm, folder: Path, log: Path, seconds: dict[str, float]) -> dict[str, Any]:
        """The arm's policy; what there is to note of its critic and labels."""
        shards, seed = self._out / "data", self._recipe.critic_seed
        seed = unit.seed if seed is None else seed
        critic_home, tag, notes = self._out / f"critic{seed}", "", {}
        if arm.after is not None:
            shards, critic_home = self._next_round(unit, arm, folder, log), folder
        if arm.method == "recap":
            critic, tag = self._labels(unit, arm, shards, critic_home, seed, seconds)
            record = load_label_record(shards, tag)
            assert record is not None, "the label job left its record"
            if record.settings != self._recipe.labels_wanted(arm):
                raise UsageError(f"{labels_folder(shards, tag)}: holds labels of other settings; remove it")
            notes = {"critic": critic, "labels": {name: task.model_dump() for name, task in record.tasks.items()}}
        job = self._recipe.policy_job(arm)
        job = Job(recipe=job.recipe, settings=(*job.settings, *arm.settings))
        own = [*stage_settings(arm, tag), f"training.seed={unit.seed}", f"training.start_from={self._out / 'pretrain'}"]
        _, seconds["policy"] = self._train("policy", folder, job, shards, own, log)
        return notes

    def _trained(self, unit: Unit, arm: str) -> Path:
        """The policy of another arm under the same seed."""
        policy = self._out / Unit(arm, unit.seed).name / "policy"
        if _summary(policy) is None:
            raise RunFailed(f"{unit.name}: {policy}, which it needs, is not trained; run its arm first")
        return policy

    def _collect(self, out: Path, wanted: Collection, name: str, log: Path, *acting: str) -> None:
        whole, facts = out.with_suffix(".json"), wanted.model_dump(mode="json")
        if whole.is_file() and json.loads(whole.read_text(encoding="utf-8")) == facts:
            return
        numbers = {"--episodes": wanted.episodes, "--corrections": wanted.corrections, "--demos": wanted.demos}
        flags = [word for flag, number in numbers.items() if number is not None for word in (flag, str(number))]
        recipe = self._recipe
        words = ["--env", recipe.env, "--out", str(out), "--name", name, *flags, *acting]
        self._crew.verb(f"{out}: collection", log, "collect", *words, *recipe.env_settings, *wanted.settings)
        write_file(whole, (json.dumps(facts, indent=1) + "\n").encode())

    def _next_round(self, unit: Unit, arm: Arm, folder: Path, log: Path) -> Path:
        """Shards: the study's and those that the arm before collects."""
        assert arm.after is not None
        data, collected = folder / "data", folder / "collected"
        if not (data / MANIFEST_NAME).is_file():
            policy = self._trained(unit, arm.after.by)
            acting = ["--checkpoint", str(policy), "--seed", str(unit.seed)]
            acting += ["evaluation.indicators=[positive]", f"evaluation.guidance_betas=[{arm.after.guidance_beta}]"]
            self._collect(collected, arm.after.collect, f"{DATA_NAME}_{arm.after.by}", log, *acting)
            merge_shards([self._out / "data", collected], data)
        return data

    def _labels(
        self, unit: Unit, arm: Arm, shards: Path, home: Path, seed: int, seconds: dict[str, float]
    ) -> tuple[dict[str, Any], str]:
        """The held-out figure that the critic was chosen by, and the tag of the arm's labels."""
        recipe, tag, log = self._recipe, f"critic{seed}", home / "critic.log"
        with self._locks[home]:
            own = ["training.stage=critic", f"training.seed={seed}"]
            own.append(f"training.start_from={self._out / 'pretrain'}")
            summary, seconds["critic"] = self._train("critic", home, recipe.critic, shards, own, log)
            if not (labels_folder(shards, tag) / LABELS_NAME).is_file():
                words = ["--checkpoint", str(best_or_latest(home / "critic")), "--shards", str(shards), "--tag", tag]
                words += recipe.label_settings
                seconds["labels"] = self._crew.script(f"{home}: labels", log, "label.py", *words)
            if arm.labels:
                tag, old = unit.name, tag
                if not (labels_folder(shards, tag) / LABELS_NAME).is_file():
                    words = ["labels", "rethreshold", str(shards), "--tag", old, "--new-tag", tag]
                    self._crew.verb(f"{unit.name}: labels", log, *words, *arm.labels)
        # The critic that labelled is its gate's best.
        gate = summary["gate"]
        return {} if gate["best"] is None else {GATES[gate["gate"]].metric: gate["best"]}, tag

    def _train(
        self, name: str, home: Path, job: Job, shards: Path, own: Sequence[str], log: Path, alone: bool = False
    ) -> tuple[dict[str, Any], float]:
        """The run's summary, and the seconds it took now."""
        run, seconds = home / name, 0.0
        if _summary(run) is None:
            words = ["--deepspeed", self._recipe.deepspeed, "--config", job.recipe, *job.settings, *own]
            words += [f"name={name}", f"runs_dir={home}", f"data.shards={shards}", "training.resume=auto"]
            seconds = self._crew.script(f"{run}: training", log, "train.py", *words, alone=alone)
        summary = _summary(run)
        if summary is None:
            raise RunFailed(f"{run}: training ended well but left no summary")
        return summary, seconds

    def _evaluate(self, unit: Unit, arm: Arm, policy: Path, folder: Path, log: Path) -> tuple[dict[str, Any], float]:
        recipe, out, seconds = self._recipe, folder / "evaluation_results.json", 0.0
        first_scene = recipe.evaluation.first_scene + unit.seed * recipe.evaluation.episodes
        if not out.is_file():
            betas = ",".join(map(str, arm.guidance_betas))
            words = ["--checkpoint", str(policy), "--env", recipe.env, "--out", str(out)]
            words += ["--episodes", str(recipe.evaluation.episodes), *recipe.env_settings, *recipe.evaluation.settings]
            words += [f"evaluation.rollout_seed={first_scene}"]
            words += ["evaluation.indicators=[positive]", f"evaluation.guidance_betas=[{betas}]"]
            seconds = self._crew.script(f"{unit.name}: evaluation", log, "evaluate.py", *words)
        return read_rollouts(out, recipe.evaluation.episodes, first_scene, arm.guidance_betas), seconds


def read_rollouts(path: Path, num_episodes: int, first_scene: int, guidance_betas: Sequence[float]) -> dict[str, Any]:
    """The ``rollouts`` of a unit's evaluation. UsageError where they are of another evaluation, or unreadable."""
    try:
        rollouts = json.loads(path.read_text(encoding="utf-8"))["rollouts"]
        betas = tuple(entry["guidance_beta"] for entry in rollouts["entries"])
        played = (rollouts["num_episodes"], rollouts["seed"], betas)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read ({type(error).__name__}: {error}); remove it") from None
    if played != (num_episodes, first_scene, tuple(guidance_betas)):
        told = f"{played[0]} episodes from seed {played[1]}, guidance {', '.join(map(str, betas))}"
        raise UsageError(f"{path}: is of another evaluation ({told}); remove it")
    return rollouts


def _summary(run: Path) -> dict[str, Any] | None:
    return RunFolder(PiStarRECAPConfig(name=run.name, runs_dir=str(run.parent))).finished_summary()


def _result(unit: Unit, rollouts: dict[str, Any], notes: dict[str, Any], seconds: dict[str, float]) -> UnitResult:
    entries = []
    for entry in rollouts["entries"]:
        tasks: dict[str, Episodes] = {}
        for episode in entry["episodes"]:
            task = tasks.setdefault(episode["task"], Episodes([], []))
            task.success.append(bool(episode["success"]))
            task.num_frames.append(int(episode["frames"]))
        entries.append(Entry(entry["indicator"], entry["guidance_beta"], tasks))
    return UnitResult(unit, float(rollouts["fps"]), entries, notes, seconds)
