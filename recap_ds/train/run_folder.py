"""A run's folder: what it was started with, and whether it may go on.

    runs/<name>/  config.yaml  ds_config.json  run.json  contract.json  metrics.jsonl  checkpoints/  base/  summary.json
                  damaged.jsonl, skipped.jsonl, spikes.jsonl and failures/ appear when there is something to list
                  stop is the user's: a file of that name ends the run in order

Only rank 0 writes here; lists and failures are every rank's, and checkpoints have rules of their own (``checkpoint/``).
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.files.atomic import write_file
from recap_ds.files.lock import lock_folder
from recap_ds.recipe import changed_keys, dump_config, is_among, load_config

# What may differ between a run and its continuation: it changes where and how fast, not what is learned.
FREE_KEYS = (
    "runs_dir",
    "checkpoint.",
    "logging.",
    "evaluation.",
    "data.shards",  # its content is compared by the manifest's hash
    "data.cache_folder",
    "data.max_cache_gib",
    "data.fetch_patience_seconds",
    "data.num_workers",
    "data.prefetch_batches",
    "data.max_damaged_fraction",
    "training.resume",
    "training.max_skipped_steps",
    "training.max_wall_minutes",
    "training.hang_timeout_seconds",
    "training.spike_action",
    "training.spike_deviations",
    "training.spike_window_steps",
    "training.spike_max_in_a_row",
    "training.spike_max_rollbacks",
    "training.activation_checkpointing",
    "training.use_amp",
    # Their product with the number of ranks, the global batch, is compared instead.
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.global_batch_size",
)
REPORTED_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "webdataset", "numpy")


def is_free(key: str) -> bool:
    return is_among(key, FREE_KEYS)


class RunFolder:
    def __init__(self, config: PiStarRECAPConfig):
        self.path = Path(config.runs_dir) / config.name
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.damaged = self.path / "damaged.jsonl"
        self.skipped = self.path / "skipped.jsonl"
        self.spikes = self.path / "spikes.jsonl"
        self.failures = self.path / "failures"
        self.stop_file = self.path / "stop"
        self._run = self.path / "run.json"
        self._summary = self.path / "summary.json"

    def check_continues(
        self, config: PiStarRECAPConfig, global_batch: int, manifest_hash: str, labels_hash: str | None = None
    ) -> None:
        """UsageError where this folder holds another run than ``config`` describes. Reads only."""
        if not self._run.is_file():
            return
        if config.training.resume == "never":
            raise UsageError(
                f"training.resume: never, but {self.path} holds a run; choose another name=, or training.resume=auto"
            )
        started = _read_json(self._run)
        # Read as a config and not as plain YAML: keys that are newer than the run take their defaults.
        old = load_config(self.path / "config.yaml")
        keys = [
            key for key in changed_keys(old.model_dump(mode="json"), config.model_dump(mode="json")) if not is_free(key)
        ]
        if global_batch != started["global_batch"]:
            keys.append(f"the global batch ({started['global_batch']} -> {global_batch})")
        if manifest_hash != started["manifest_hash"]:
            keys.append("the shards (another manifest)")
        if labels_hash != started.get("labels_hash"):
            keys.append(f"the labels (other ones under the tag '{config.data.labels}')")
        if keys:
            raise UsageError(
                f"{self.path} holds a run with other settings: {', '.join(keys)}; choose another name=, "
                "or give the settings it was started with"
            )

    def lock(self) -> None:
        """UsageError where another process trains in this folder. Held until this process ends. Rank 0 only."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.path)
        if self._lock is None:
            raise UsageError(
                f"{self.path}: another process trains in this folder; wait for it, stop it, or choose another name="
            )

    def unlock(self) -> None:
        self._lock.close()

    def start(
        self,
        config: PiStarRECAPConfig,
        ds_config: dict,
        global_batch: int,
        manifest_hash: str,
        labels_hash: str | None = None,
    ) -> None:
        """Write down what this run is. Rank 0 only."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_file(self.path / "config.yaml", dump_config(config).encode())
        write_file(self.path / "ds_config.json", _json(ds_config))
        facts = {
            "global_batch": global_batch,
            "manifest_hash": manifest_hash,
            "labels_hash": labels_hash,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("recap_ds", *REPORTED_PACKAGES)},
        }
        # Last: from here on the folder holds a run, and check_continues reads the rest.
        write_file(self._run, _json(facts))

    def facts(self) -> dict | None:
        """What the run was started with: global_batch, manifest_hash, ...; None where there is no run."""
        return _read_json(self._run) if self._run.is_file() else None

    def finished_summary(self) -> dict | None:
        """The summary of a finished run; None while it is not."""
        return _read_json(self._summary) if self._summary.is_file() else None

    def ignored_settings(self, config: PiStarRECAPConfig) -> list[str]:
        """Keys of ``evaluation`` that differ from those this finished run was judged by: nothing asks them any more."""
        old, new = (each.evaluation.model_dump() for each in (load_config(self.path / "config.yaml"), config))
        return [f"evaluation.{key}" for key in changed_keys(old, new)]

    def finish(self, summary: dict) -> None:
        write_file(self._summary, _json(summary))

    def forget_after(self, step: int) -> None:
        """Drop metric lines of steps that a restart will take again, and one cut off in writing. Rank 0 only."""
        if self.metrics.is_file():
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= step]
            write_file(self.metrics, "".join(kept).encode())


def _step_of(line: str) -> int | None:
    """The step a line of metrics belongs to; None where it was cut off or damaged."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else None
    except (ValueError, TypeError, KeyError):
        return None


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); restore it, or choose another name=") from None


def _json(values: dict) -> bytes:
    return (json.dumps(values, indent=1, allow_nan=False) + "\n").encode()
