"""One unit: an arm's policy under one seed, trained and judged, and what it shares with others of its seed.

    OUT/data                                     the collected shards
    OUT/pretrain                                 the run that every other one begins with
    OUT/critic0/critic                           the critic of the seed, and of all its arms that read labels
    OUT/ARM-seed0/policy  evaluation_results.json  log.txt
    OUT/ARM-seed0/collected  data  critic        of an arm that comes after another: its own round of data

A job is done when its own summary, labels or results are there, so whatever ends a study, the next start finds out by
looking; ``folder.py`` keeps what says of which recipe they are, and made of what. Labels lie beside the shards they are
of, under critic0 (the critic's) or ARM-seed0 (of other settings).
"""

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recap_ds.checkpoint.layout import best_or_latest
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.label_records import LABELS_NAME
from recap_ds.data.labels import labels_folder, load_label_record
from recap_ds.data.manifest import MANIFEST_NAME
from recap_ds.data.merge import merge_shards
from recap_ds.data.values import values_folder
from recap_ds.errors import RunFailed, UsageError
from recap_ds.study.folder import (
    check_sources,
    claim_study,
    claim_unit,
    hash_of,
    hash_of_run,
    mark_whole,
    shards_are_whole,
)
from recap_ds.study.programs import Crew
from recap_ds.study.recipe import Arm, Collection, Job, StudyRecipe, Unit, stage_settings
from recap_ds.study.results import UnitResult
from recap_ds.study.rollouts import Rollouts, read_rollouts
from recap_ds.train.gate import GATES
from recap_ds.train.run_folder import RunFolder

# Of all data sets of a study: their scenes follow from it.
DATA_NAME = "study"


class UnitRunner:
    """``out``: the study's folder. Safe to use by several threads: what units share is made once."""

    def __init__(self, recipe: StudyRecipe, out: Path, crew: Crew) -> None:
        self._recipe, self._out, self._crew = recipe, out, crew
        self._locks: dict[Path, threading.Lock] = defaultdict(threading.Lock)

    def prepare(self, units: Sequence[Unit]) -> None:
        """What all units share: data and pre-training. ``units``: those that are to run."""
        recipe, log = self._recipe, self._out / "log.txt"
        claim_study(self._out, recipe, units)
        self._collect(self._out / "data", recipe.data, DATA_NAME, log, {})
        job = Job(recipe=recipe.pretrain.recipe, settings=(*recipe.pretrain.settings, "training.start_from=null"))
        own = ["training.stage=policy", "recap.sft=true"]
        self._train("pretrain", self._out, job, self._out / "data", own, log, {}, alone=True)

    def run(self, unit: Unit) -> UnitResult:
        arm, folder = self._recipe.arms[unit.arm], self._out / unit.name
        claim_unit(self._out, self._recipe, unit)
        log, seconds, notes = folder / "log.txt", {}, {}
        if arm.policy_of is None:
            policy = folder / "policy"
            notes = self._learn(unit, arm, folder, log, seconds)
        else:
            policy = self._trained(unit)
        rollouts, seconds["evaluation"] = self._evaluate(unit, arm, policy, folder, log)
        return UnitResult(unit, *rollouts, notes, {name: round(value, 1) for name, value in seconds.items()})

    def _learn(self, unit: Unit, arm: Arm, folder: Path, log: Path, seconds: dict[str, float]) -> dict[str, Any]:
        """The arm's policy; what there is to note of its critic and labels."""
        shards, tag, notes, sources = self._out / "data", "", {}, {}
        if arm.after is not None:
            shards = self._next_round(unit, arm, folder, log)
        if arm.method == "recap":
            critic, tag = self._labels(unit, arm, shards, seconds)
            record = load_label_record(shards, tag)
            assert record is not None, "the label job left its record"
            if record.settings != self._recipe.labels_wanted(arm):
                raise UsageError(f"{labels_folder(shards, tag)}: holds labels of other settings; remove it")
            notes = {"critic": critic, "labels": {name: task.model_dump() for name, task in record.tasks.items()}}
            sources = {"labels": record.content_hash()}
        job = self._recipe.policy_job(arm)
        job = Job(recipe=job.recipe, settings=(*job.settings, *arm.settings))
        own = [*stage_settings(arm, tag), f"training.seed={unit.seed}", f"training.start_from={self._out / 'pretrain'}"]
        _, seconds["policy"] = self._train("policy", folder, job, shards, own, log, self._started_from() | sources)
        return notes

    def _started_from(self) -> dict[str, str]:
        return {"pre-training": hash_of_run(self._out / "pretrain")}

    def _trained(self, unit: Unit) -> Path:
        """The policy that a unit needs, of the same seed."""
        needed = self._recipe.needed(unit)
        assert needed is not None, "asked of a unit that needs one"
        policy = self._out / needed.name / "policy"
        if _summary(policy) is None:
            raise RunFailed(f"{unit.name}: needs {policy}, which is not there; give the --out that the results are of")
        return policy

    def _collect(
        self, out: Path, wanted: Collection, name: str, log: Path, sources: Mapping[str, str], *acting: str
    ) -> None:
        check_sources(out, out, sources)
        if shards_are_whole(out):
            return
        numbers = {"--episodes": wanted.episodes, "--corrections": wanted.corrections, "--demos": wanted.demos}
        flags = [word for flag, number in numbers.items() if number is not None for word in (flag, str(number))]
        recipe = self._recipe
        words = ["--env", recipe.env, "--out", str(out), "--name", name, *flags, *acting]
        self._crew.verb(f"{out}: collection", log, "collect", *words, *recipe.env_settings, *wanted.settings)
        mark_whole(out)

    def _next_round(self, unit: Unit, arm: Arm, folder: Path, log: Path) -> Path:
        """Shards: the study's and those that the arm before collects."""
        assert arm.after is not None
        data, collected, policy = folder / "data", folder / "collected", self._trained(unit)
        acting = ["--checkpoint", str(policy), "--seed", str(unit.seed)]
        acting += ["evaluation.indicators=[positive]", f"evaluation.guidance_betas=[{arm.after.guidance_beta}]"]
        sources = {"policy": hash_of_run(policy)}
        self._collect(collected, arm.after.collect, f"{DATA_NAME}_{arm.after.by}", log, sources, *acting)
        parts = [self._out / "data", collected]
        check_sources(data, data, {part.name: hash_of(part / MANIFEST_NAME) for part in parts})
        if not (data / MANIFEST_NAME).is_file():
            merge_shards(parts, data)
        return data

    def _labels(self, unit: Unit, arm: Arm, shards: Path, seconds: dict[str, float]) -> tuple[dict[str, Any], str]:
        """The held-out figure that the critic was chosen by, and the tag of the arm's labels."""
        recipe, seed = self._recipe, self._recipe.seed_of_critic(unit)
        home, tag = self._out / str(recipe.critic_of(unit)), f"critic{seed}"
        log = home / "critic.log"
        with self._locks[home]:
            own = ["training.stage=critic", f"training.seed={seed}"]
            own.append(f"training.start_from={self._out / 'pretrain'}")
            sources = self._started_from()
            summary, seconds["critic"] = self._train("critic", home, recipe.critic, shards, own, log, sources)
            # Values first: with those of another critic the label job would go on.
            critic = best_or_latest(home / "critic")
            for folder in (values_folder(shards, tag), labels_folder(shards, tag)):
                check_sources(folder, home / folder.parent.name, {"critic": hash_of_run(critic)})
            if not (labels_folder(shards, tag) / LABELS_NAME).is_file():
                words = ["--checkpoint", str(critic), "--shards", str(shards), "--tag", tag, *recipe.label_settings]
                seconds["labels"] = self._crew.script(f"{home}: labels", log, "label.py", *words)
            if arm.labels:
                tag = self._other_labels(unit, arm, shards, tag, log)
        # The critic that labelled is its gate's best.
        gate = summary["gate"]
        return {} if gate["best"] is None else {GATES[gate["gate"]].metric: gate["best"]}, tag

    def _other_labels(self, unit: Unit, arm: Arm, shards: Path, tag: str, log: Path) -> str:
        """Labels of the arm's own settings, of the same values as those under ``tag``; their tag."""
        folder = labels_folder(shards, unit.name)
        sources = {"labels": hash_of(labels_folder(shards, tag) / LABELS_NAME)}
        check_sources(folder, self._out / unit.name / "own_labels", sources)
        if not (folder / LABELS_NAME).is_file():
            words = ["labels", "rethreshold", str(shards), "--tag", tag, "--new-tag", unit.name]
            self._crew.verb(f"{unit.name}: labels", log, *words, *arm.labels)
        return unit.name

    def _train(
        self,
        name: str,
        home: Path,
        job: Job,
        shards: Path,
        own: Sequence[str],
        log: Path,
        sources: Mapping[str, str],
        alone: bool = False,
    ) -> tuple[dict[str, Any], float]:
        """The run's summary, and the seconds it took now. ``sources``: beside the shards."""
        run, seconds = home / name, 0.0
        check_sources(run, run, {"shards": hash_of(shards / MANIFEST_NAME), **sources})
        if _summary(run) is None:
            words = ["--deepspeed", self._recipe.deepspeed, "--config", job.recipe, *job.settings, *own]
            words += [f"name={name}", f"runs_dir={home}", f"data.shards={shards}", "training.resume=auto"]
            seconds = self._crew.script(f"{run}: training", log, "train.py", *words, alone=alone)
        summary = _summary(run)
        if summary is None:
            raise RunFailed(f"{run}: training ended well but left no summary")
        return summary, seconds

    def _evaluate(self, unit: Unit, arm: Arm, policy: Path, folder: Path, log: Path) -> tuple[Rollouts, float]:
        recipe, out, seconds = self._recipe, folder / "evaluation_results.json", 0.0
        first_scene = recipe.first_scene(unit.seed)
        check_sources(out, folder / "evaluation", {"policy": hash_of_run(policy)})
        if not out.is_file():
            betas = ",".join(map(str, arm.guidance_betas))
            words = ["--checkpoint", str(policy), "--env", recipe.env, "--out", str(out)]
            words += ["--episodes", str(recipe.evaluation.episodes), *recipe.env_settings, *recipe.evaluation.settings]
            words += [f"evaluation.rollout_seed={first_scene}"]
            words += ["evaluation.indicators=[positive]", f"evaluation.guidance_betas=[{betas}]"]
            seconds = self._crew.script(f"{unit.name}: evaluation", log, "evaluate.py", *words)
        return read_rollouts(out, recipe.evaluation.episodes, first_scene, arm.guidance_betas), seconds


def _summary(run: Path) -> dict[str, Any] | None:
    return RunFolder(PiStarRECAPConfig(name=run.name, runs_dir=str(run.parent))).finished_summary()
