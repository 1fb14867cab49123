"""How runs were configured, and what they were made of: differences first, everything folded away below."""

import json
from collections.abc import Sequence
from typing import Any

import yaml

from recap_ds.config import PiStarRECAPConfig
from recap_ds.recipe import changed_keys
from recap_ds.report.page import Html, folded, table
from recap_ds.report.run_record import RunRecord
from recap_ds.report.svg import escape
from recap_ds.train.run_folder import FREE_KEYS

NOT_COMPARED = ("name", "runs_dir")
MISSING = "-"


def differing_part(records: Sequence[RunRecord]) -> Html:
    """A row per key in which any run differs from the first; those that change what is learned come first."""
    keys = {
        key
        for record in records[1:]
        for key in changed_keys(records[0].config, record.config)
        if key not in NOT_COMPARED and record.config and records[0].config
    }
    rows = [
        (key, *(_value(record, key) for record in records), "no" if _is_free(key) else "yes")
        for key in sorted(keys, key=lambda key: (_is_free(key), key))
    ]
    for name, told in (
        ("global_batch", "global batch"),
        ("manifest_hash", "shards (manifest)"),
        ("labels_hash", "labels"),
        ("versions", "versions"),
    ):
        facts = [_fact(record, name) for record in records]
        if len(set(facts)) > 1:
            rows.append((told, *facts, "no" if name == "versions" else "yes"))
    header = ("setting", *(record.name for record in records), "changes what is learned")
    return table(f"Settings that differ ({len(rows)})", header, rows)


def settings_part(record: RunRecord, with_name: bool) -> str:
    """What the run says that is not the default; then all there is."""
    defaults = PiStarRECAPConfig().model_dump(mode="json")
    keys = [key for key in changed_keys(defaults, record.config) if key not in NOT_COMPARED]
    rows = [(key, _value(record, key), _show(_lookup(defaults, key))) for key in keys] if record.config else []
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
        ("global batch", _show(facts.get("global_batch"))),
        ("shards", f"{record.setting('data.shards')}, manifest {_show(facts.get('manifest_hash'))}"),
        ("labels", f"{record.setting('data.labels')}, {facts['labels_hash']}" if facts.get("labels_hash") else MISSING),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items()) or MISSING),
        ("Python", _show(facts.get("python"))),
        ("checkpoints", ", ".join(f"{step:,}" for step in marks.steps) or MISSING),
        ("latest, best", f"{_show(marks.latest)}, {_show(marks.best)}"),
    ]
    return table("Where it comes from", ("", ""), rows)


def _is_free(key: str) -> bool:
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE_KEYS)


def _lookup(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _value(record: RunRecord, key: str) -> str:
    return _show(_lookup(record.config, key))


def _fact(record: RunRecord, name: str) -> str:
    value = (record.facts or {}).get(name)
    if isinstance(value, dict):
        return ", ".join(f"{package} {version}" for package, version in value.items())
    return _show(value)[:12] if name.endswith("_hash") else _show(value)


def _show(value: Any) -> str:
    if value is None:
        return MISSING
    return value if isinstance(value, str) else json.dumps(value)
