"""Are the recipe's pre-trained weights on this machine? Nothing is downloaded to find out."""

from pathlib import Path

from recap_ds.config import ModelConfig
from recap_ds.doctor.page import Finding, fail, ok, warn
from recap_ds.errors import UsageError
from recap_ds.files.records import size_problems
from recap_ds.models.export_format import ExportRecord
from recap_ds.models.vlm_weights import load_vlm_config, weight_files


def start_finding(export: Path) -> Finding:
    """Of an export that ``training.start_from`` names: it brings the VLM, and no other is needed."""
    try:
        files = ExportRecord.load(export).files
    except UsageError as error:
        return fail("weights", f"training.start_from: {error}")
    if problems := size_problems(export, files):
        return fail("weights", f"training.start_from: {export}: {problems[0]}", "copy or import the export again")
    total = sum(record.bytes for record in files.values())
    return ok("weights", f"the run starts from {export}: {len(files)} files, {total / 1e9:.2f} GB")


def weights_finding(config: ModelConfig) -> Finding:
    name = config.vlm_model_name
    if name == "tiny":
        return ok("weights", "the tiny VLM needs none")
    folder = Path(name).expanduser()
    if not folder.is_dir() and not name.startswith((".", "/", "~")):
        cached = _cached(name, config.vlm_revision)
        if cached is None:
            mend = f"log in (hf auth login), accept the licence, then: hf download {name}"
            return warn("weights", f"{name} is not in this machine's hub cache; the first run downloads it", mend)
        folder = cached
    try:
        if not folder.is_dir():
            raise UsageError(f"model.vlm_model_name: there is no folder {name}; name one that is, or a hub id")
        load_vlm_config(folder, config.image_size)
        files = [] if config.vlm_random_init else weight_files(folder)
    except UsageError as error:
        return fail("weights", str(error))
    total = sum(file.stat().st_size for file in files)
    return ok("weights", f"{folder}: {len(files)} weight file(s), {total / 1e9:.2f} GB")


def _cached(repository: str, revision: str | None) -> Path | None:
    """The snapshot in the hub's cache; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None
