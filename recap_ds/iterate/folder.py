"""One folder per iteration, and how to see what of it is done.

    OUT/settings.json                what the iterations are made with; another recipe in the same folder is refused
    OUT/iteration_01/
        shards critic_start policy_start labels     relative links to what the iteration uses
        collected/ data/                            where the iteration collects: its own episodes, and all so far
        critic/ policy/                             two training runs
        evaluation_results.json                     of the policy in the environment, where the recipe has one
        iteration.json                              written at the end: settings, labels and both summaries

Nothing remembers the progress: a run is done when its own summary is there, labels when the folder ``labels`` points at
holds its labels.json, collection and evaluation when there are data/manifest.json and the results. So whatever
interrupts an iteration, the next start finds out by looking.
"""

import json
import os
from pathlib import Path

from recap_ds.checkpoint.layout import best_or_latest
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.label_records import LABELS_NAME
from recap_ds.data.labels import labels_folder
from recap_ds.data.manifest import MANIFEST_NAME
from recap_ds.data.values import values_folder
from recap_ds.errors import RunFailed, UsageError
from recap_ds.files.atomic import write_file
from recap_ds.iterate.recipe import IterationRecipe, TrainingJob
from recap_ds.recipe import build_config, changed_keys
from recap_ds.train.run_folder import FREE_KEYS, RunFolder

SETTINGS_NAME = "settings.json"
RECORD_NAME = "iteration.json"
RESULTS_NAME = "evaluation_results.json"


class IterationFolder:
    def __init__(self, out: Path, number: int):
        self.path = out / f"iteration_{number:02d}"
        self.shards = self.path / "shards"
        self.labels = self.path / "labels"
        self.collected, self.data = self.path / "collected", self.path / "data"
        self.policy = self.path / "policy"
        self.results = self.path / RESULTS_NAME
        self._record = self.path / RECORD_NAME

    def check_tag(self, recipe: IterationRecipe, number: int) -> None:
        """UsageError where the shards have labels of that tag by another critic: the label job would refuse them."""
        tag, shards = recipe.tag(number), self.shards_of(recipe, number)
        if self.summary("critic") is not None:
            return  # then they may be its own, and the label job knows
        for folder in (values_folder(shards, tag), labels_folder(shards, tag)):
            if folder.exists():
                raise UsageError(f"{folder}: is there already, of another critic; choose another name: in the recipe")

    def shards_of(self, recipe: IterationRecipe, number: int) -> Path:
        """Named by the recipe, or collected by the iteration itself."""
        return Path(recipe.shards[number - 1]) if number <= len(recipe.shards) else self.data

    def data_are_whole(self) -> bool:
        """True = what the iteration collects is there, with all data before."""
        return (self.data / MANIFEST_NAME).is_file()

    def start(self, recipe: IterationRecipe, number: int) -> None:
        """Link what the iteration starts from. What is linked already stays: ``latest`` may have moved since."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._link(self.shards, self.shards_of(recipe, number))
        for name, job in (("critic", recipe.critic), ("policy", recipe.policy)):
            path = None if self._start(name).is_symlink() else job.start()
            if path is not None:
                self._link(self._start(name), path)

    def _start(self, job: str) -> Path:
        return self.path / f"{job}_start"

    def start_of(self, job: str, wanted: TrainingJob) -> str | None:
        """What a training job starts from, seen through the link: a step folder is known by its own name."""
        return None if wanted.start_from is None else str(self._start(job).resolve(strict=True))

    def summary(self, job: str) -> dict | None:
        """Of a finished training run; None while it is not."""
        return RunFolder(PiStarRECAPConfig(name=job, runs_dir=str(self.path))).finished_summary()

    def critic_checkpoint(self) -> Path:
        return best_or_latest(self.path / "critic")

    def labels_are_done(self) -> bool:
        return (self.labels / LABELS_NAME).is_file()

    def adopt_labels(self, tag: str) -> None:
        """Link the labels just written beside the shards."""
        folder = labels_folder(self.shards.resolve(), tag)
        if not (folder / LABELS_NAME).is_file():
            raise RunFailed(f"the label job ended well but left no {folder / LABELS_NAME}")
        self._link(self.labels, folder)

    def finish(self, record: dict) -> None:
        write_file(self._record, _json(record))

    def _link(self, link: Path, target: Path) -> None:
        """A relative link, so that the folder can move together with what it points at."""
        wanted = os.path.relpath(target.resolve(), link.parent.resolve())
        if link.is_symlink() and os.readlink(link) != wanted:
            raise UsageError(f"{link} points at {os.readlink(link)}, not at {wanted}; choose another --out")
        if not link.is_symlink():
            link.symlink_to(wanted)


def check_settings(out: Path, recipe: IterationRecipe) -> None:
    """UsageError where ``out`` holds iterations made with other settings; else write them down."""
    path, settings = out / SETTINGS_NAME, _settings(recipe)
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for job in ("critic", "policy"):  # keys that are newer than the folder take their defaults
            before[job] = build_config(before[job]).model_dump(mode="json")
        before = {"env": None, "collect": None} | before  # newer than the first folders
        keys = [key for key in changed_keys(before, settings) if not _is_free(key)]
        if keys:
            raise UsageError(f"{out} holds iterations with other settings: {', '.join(keys)}; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_file(path, _json(settings))


def _settings(recipe: IterationRecipe) -> dict:
    """Everything that decides what is learned. Shards are linked by each iteration, and may grow in number."""
    return {
        "name": recipe.name,
        "critic": recipe.critic_config().model_dump(mode="json"),
        "critic_start": recipe.critic.start_from,
        "label": sorted(recipe.label.settings),
        "policy": recipe.policy_config().model_dump(mode="json"),
        "policy_start": recipe.policy.start_from,
        "env": None if recipe.env is None else recipe.env.model_dump(mode="json"),
        "collect": None if recipe.collect is None else recipe.collect.model_dump(mode="json"),
    }


def _is_free(key: str) -> bool:
    """True = may differ when iterations go on, as in a training run."""
    setting = key.partition(".")[2]
    return any(setting == free or (free.endswith(".") and setting.startswith(free)) for free in FREE_KEYS)


def _json(values: dict) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
