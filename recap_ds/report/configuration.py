"""How runs were configured, and what they were made of: differences first, everything folded away below."""

import json
from collections.abc import Sequence
from typing import Any

import yaml

from recap_ds.config import PiStarRECAPConfig
from recap_ds.recipe import changed_keys
from recap_ds.report.page import Html, breakable, folded, paragraph, table
from recap_ds.report.run_record import RunRecord
from recap_ds.report.svg import escape
from recap_ds.train.run_folder import is_free

NOT_COMPARED = ("name", "runs_dir")
MISSING = "-"
# What decides which samples are held out and judged.
HELD_OUT_KEYS = {"data.held_out_fraction", "training.seed", "evaluation.max_samples"}
NOT_COMPARABLE = (
    "These runs are judged on different held-out samples: compare their held-out figures with care, or judge their "
    "exports on the same shards with launch/evaluate.py."
)


def differing_part(records: Sequence[RunRecord]) -> Html:
    """A row per key in which any run differs from the first; those that change what is learned come first.

    Above them a warning where held-out figures are of other samples.
    """
    keys = {key for record in records[1:] for key in _differing_keys(record, records[0])}
    rows = [
        (breakable(key), *(_value(record, key) for record in records), "no" if is_free(key) else "yes")
        for key in sorted(keys, key=lambda key: (is_free(key), key))
    ]
    for name, told in (
        ("global_batch", "global batch"),
        ("manifest_hash", "shards (manifest)"),
        ("labels_hash", "labels"),
        ("versions", "versions"),
    ):
        if _differs(records, name):
            facts = [_fact(record, name) for record in records]
            rows.append((told, *facts, "no" if name == "versions" else "yes"))
    header = ("setting", *(record.name for record in records), "changes what is learned")
    warning = paragraph(NOT_COMPARABLE) if keys & HELD_OUT_KEYS or _differs(records, "manifest_hash") else ""
    return Html(f"{warning}{table(f'Settings that differ ({len(rows)})', header, rows)}")


def _differs(records: Sequence[RunRecord], fact: str) -> bool:
    return len({_fact(record, fact) for record in records if record.facts is not None}) > 1


def _differing_keys(record: RunRecord, first: RunRecord) -> list[str]:
    if not record.config or not first.config:
        return []
    return [key for key in changed_keys(first.config, record.config) if key not in NOT_COMPARED]


def learning_keys(record: RunRecord, first: RunRecord) -> list[str]:
    """The settings in which two runs differ and that change what is learned."""
    return [key for key in _differing_keys(record, first) if not is_free(key)]


def settings_part(record: RunRecord, with_name: bool) -> str:
    """What the run says that is not the default; then all there is."""
    defaults = PiStarRECAPConfig().model_dump(mode="json")
    keys = [key for key in changed_keys(defaults, record.config) if key not in NOT_COMPARED]
    rows = (
        [(breakable(key), _value(record, key), show(_lookup(defaults, key))) for key in keys] if record.config else []
    )
    parts = [
        table("Settings that are not the defaults", ("setting", "this run", "default"), rows),
        _provenance(record),
    ]
    for title, text in (
        ("config.yaml", yaml.safe_dump(record.config, sort_keys=False) if record.config else ""),
        ("ds_config.json", "" if record.ds_config is None else json.dumps(record.ds_config, indent=1)),
        ("contract.json", "" if record.contract is None else json.dumps(record.contract, indent=1)),
    ):
        if text:
            parts.append(folded(f"All of {title}", f"<pre>{escape(text)}</pre>"))
    name = f"<h3>{escape(record.name)}</h3>" if with_name else ""
    return name + "".join(parts)


def _provenance(record: RunRecord) -> Html:
    facts, marks = record.facts or {}, record.checkpoints
    rows = [
        ("folder", str(record.path.resolve())),
        ("stage", record.stage if record.config else MISSING),
        ("global batch", show(facts.get("global_batch"))),
        ("shards", f"{record.setting('data.shards')}, manifest {show(facts.get('manifest_hash'))}"),
        ("labels", f"{record.setting('data.labels')}, {facts['labels_hash']}" if facts.get("labels_hash") else MISSING),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items()) or MISSING),
        ("Python", show(facts.get("python"))),
        ("checkpoints", ", ".join(f"{step:,}" for step in marks.steps) or MISSING),
        ("latest, best", f"{show(marks.latest)}, {show(marks.best)}"),
    ]
    return table("Where it comes from", ("", ""), rows)


def _lookup(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _value(record: RunRecord, key: str) -> str:
    return show(_lookup(record.config, key))


def _fact(record: RunRecord, name: str) -> str:
    value = (record.facts or {}).get(name)
    if isinstance(value, dict):
        return ", ".join(f"{package} {version}" for package, version in value.items())
    return show(value)[:12] if name.endswith("_hash") else show(value)


def show(value: Any) -> str:
    """A setting as it would be written."""
    if value is None:
        return MISSING
    return value if isinstance(value, str) else json.dumps(value)
