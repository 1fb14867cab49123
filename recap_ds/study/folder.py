"""What lies in a study's folder, of which recipe and made of what: nothing is taken for what it is not.

    OUT/study.json              what all units share, as the recipe says it
    OUT/ARM-seed0/unit.json     what is the arm's own, and the arm's that it needs
    HOME/THING.sources.json     hashes of what THING is made of, written before it is begun
    HOME/THING.json             of shards that were collected: the hash of the whole, written after

A thing of other sources is refused and not made anew by itself: it may have taken days.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from recap_ds.checkpoint.layout import STATE_NAME, resolve_checkpoint
from recap_ds.data.manifest import MANIFEST_NAME
from recap_ds.errors import UsageError
from recap_ds.files.records import read_checked_json, record_file, write_checked_json
from recap_ds.recipe import changed_keys
from recap_ds.study.facts import ANOTHER_RECIPE, arm_facts, changed_arm_facts, changed_shared_facts, shared_facts
from recap_ds.study.recipe import StudyRecipe, Unit

FORMAT_VERSION = 1
STUDY_NAME, UNIT_NAME = "study.json", "unit.json"


def claim_study(out: Path, recipe: StudyRecipe, units: Iterable[Unit]) -> None:
    """Write down whose folder ``out`` is; UsageError where it, or that of one of ``units``, is another recipe's."""
    _check_facts(out / STUDY_NAME, lambda there: changed_shared_facts(there, recipe), (out / "data", out / "pretrain"))
    for unit in units:
        _check_unit(out, recipe, unit)
    _write(out / STUDY_NAME, shared_facts(recipe))


def claim_unit(out: Path, recipe: StudyRecipe, unit: Unit) -> None:
    """As ``claim_study``, for what is the unit's own."""
    _check_unit(out, recipe, unit)
    _write(out / unit.name / UNIT_NAME, arm_facts(recipe, unit.arm))


def _check_unit(out: Path, recipe: StudyRecipe, unit: Unit) -> None:
    folder = out / unit.name
    made = [folder / name for name in ("collected", "critic", "policy", "evaluation_results.json")]
    _check_facts(folder / UNIT_NAME, lambda there: changed_arm_facts(there, recipe, unit.arm), made)


def _check_facts(record: Path, changed: Callable[[dict[str, Any]], list[str]], made: Iterable[Path]) -> None:
    if not record.exists():
        if there := [str(path) for path in made if path.exists()]:
            raise UsageError(f"{there[0]}: is there, but no {record} that says of which recipe; give another --out")
        return
    try:
        keys = changed(_read(record))
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{record}: is not of this version ({type(error).__name__}: {error}); give another --out"
        ) from None
    if keys:
        raise UsageError(f"{record.parent}: holds runs of another recipe: {', '.join(keys)}; {ANOTHER_RECIPE}")


def check_sources(thing: Path, record: Path, sources: Mapping[str, str]) -> None:
    """Write down what ``thing`` is about to be made of; UsageError where it was made, or begun, of something else.

    ``sources``: the hash of each by what it is called. ``record``: without its ending.
    """
    path = record.with_name(f"{record.name}.sources.json")
    if thing.exists():
        keys = changed_keys(_read(path), dict(sources)) if path.is_file() else list(sources)
        if keys:
            raise UsageError(
                f"{thing}: was made of another {' and '.join(keys)} than there is now; remove it, and the same command "
                "makes it anew"
            )
    _write(path, dict(sources))


def shards_are_whole(shards: Path) -> bool:
    """True = they are as ``mark_whole`` found them."""
    mark = _mark(shards)
    return mark.exists() and _read(mark) == {"manifest": hash_of(shards / MANIFEST_NAME)}


def mark_whole(shards: Path) -> None:
    _write(_mark(shards), {"manifest": hash_of(shards / MANIFEST_NAME)})


def _mark(shards: Path) -> Path:
    return shards.with_name(f"{shards.name}.json")


def hash_of(file: Path) -> str:
    """'' where it is not there."""
    return record_file(file).sha256 if file.is_file() else ""


def hash_of_run(checkpoint: Path) -> str:
    """Of a run, or of one of its checkpoints: what names the checksums of all its files."""
    return hash_of(resolve_checkpoint(checkpoint) / STATE_NAME)


def _read(path: Path) -> dict[str, Any]:
    try:
        body = read_checked_json(path, FORMAT_VERSION)
    except UsageError as error:
        raise UsageError(f"{error}; restore it, or give another --out") from None
    del body["format_version"]
    return body


def _write(path: Path, body: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checked_json(path, {"format_version": FORMAT_VERSION, **body})
