"""One folder per iteration, and how to see what of it is done.

    OUT/settings.json                what the iterations are made with; another recipe in the same folder is refused
    OUT/iteration_01/
        shards critic_start policy_start labels     relative links to what the iteration uses
        collected/ data/                            where the iteration collects: its own episodes, and all so far
        critic/ policy/                             two training runs
        evaluation_results.json                     of the policy in the environment, where the recipe has one
        iteration.json                              written at the end: settings, labels and both summaries

Nothing remembers the progress: a run is done when its own summary is there, labels when the folder ``labels`` points at
holds its labels.json, collection when there is data/manifest.json, evaluation when there are results and iteration.json
says that they are of this policy and were asked for like this. So whatever interrupts an iteration, the next start
finds out by looking.
"""

import json
import os
from pathlib import Path

from recap_ds.checkpoint.layout import best_or_latest
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.label_records import LABELS_NAME
from recap_ds.data.labels import labels_folder
from recap_ds.data.manifest import MANIFEST_NAME, Manifest
from recap_ds.data.values import values_folder
from recap_ds.errors import RunFailed, UsageError
from recap_ds.files.atomic import write_file
from recap_ds.files.records import read_checked_json, write_checked_json
from recap_ds.iterate.recipe import IterationRecipe, TrainingJob
from recap_ds.recipe import build_config, changed_keys
from recap_ds.train.run_folder import RunFolder, is_free

SETTINGS_NAME = "settings.json"
RECORD_NAME = "iteration.json"
RESULTS_NAME = "evaluation_results.json"
FORMAT_VERSION = 1  # of settings.json
# Of a training job they are free, but by them the critic's checkpoint is chosen that labels.
CHOOSING_KEYS = tuple(f"critic.evaluation.{key}" for key in ("every_steps", "max_samples", "batch_size", "gate"))


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
        return self._run(job).finished_summary()

    def _run(self, job: str) -> RunFolder:
        return RunFolder(PiStarRECAPConfig(name=job, runs_dir=str(self.path)))

    def global_batch(self, job: str) -> int | None:
        """Of a training run that began; None where there is none."""
        facts = self._run(job).facts()
        return None if facts is None else facts["global_batch"]

    def check_data(self, shards: Path) -> None:
        """UsageError where ``shards`` are not those that the iteration's runs began with."""
        for job in ("critic", "policy"):
            facts = self._run(job).facts()
            if facts is not None and facts["manifest_hash"] != Manifest.load(shards).content_hash():
                raise UsageError(
                    f"{shards}: holds other data than {self.path / job} began with; put new data in a folder of their "
                    "own, as the next of shards:, or choose another --out"
                )

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

    def is_evaluated(self, recipe: IterationRecipe) -> bool:
        """True = there are results, of the policy that is there, asked for as ``recipe`` does."""
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            asked, policy = {key: record["recipe"][key] for key in ("env", "evaluate")}, record["policy"]
        except (OSError, ValueError, KeyError, TypeError):
            return False  # not known: made before, or cut off
        wanted = recipe.model_dump(mode="json", include={"env", "evaluate"})
        return self.results.is_file() and asked == wanted and policy == self.summary("policy")

    def finish(self, record: dict) -> None:
        write_file(self._record, (json.dumps(record, indent=1) + "\n").encode())

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
        before = _read_settings(path)
        keys = [key for key in changed_keys(before, settings) if not _is_free(key)]
        if not any(folder.is_dir() for folder in out.glob("iteration_*/collected")):
            keys = [key for key in keys if key.split(".")[0] not in ("env", "collect")]
        keys += _other_batches(IterationFolder(out, 1), recipe)
        if keys:
            raise UsageError(f"{out} holds iterations with other settings: {', '.join(keys)}; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_checked_json(path, {"format_version": FORMAT_VERSION, **settings})


def _read_settings(path: Path) -> dict:
    try:
        before = read_checked_json(path, FORMAT_VERSION)
    except UsageError as error:
        raise UsageError(f"{error}; remove it if the recipe is still that of these iterations") from None
    del before["format_version"]
    for job in ("critic", "policy"):  # keys that are newer than the folder take their defaults
        before[job] = build_config(before[job]).model_dump(mode="json")
    return before


def _other_batches(first: IterationFolder, recipe: IterationRecipe) -> list[str]:
    """Global batches that the recipe wants to be others than the first iteration's were."""
    wanted = {"critic": recipe.critic_config(), "policy": recipe.policy_config()}
    sizes = {job: (first.global_batch(job), config.training.global_batch_size) for job, config in wanted.items()}
    return [
        f"{job}.training.global_batch_size ({was} -> {size})"
        for job, (was, size) in sizes.items()
        if None not in (was, size) and was != size
    ]


def _settings(recipe: IterationRecipe) -> dict:
    """Everything that decides what is learned. Shards are linked by each iteration, and may grow in number."""
    return {
        "name": recipe.name,
        "deepspeed": recipe.arithmetic(),
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
    return is_free(key.partition(".")[2]) and key not in CHOOSING_KEYS
