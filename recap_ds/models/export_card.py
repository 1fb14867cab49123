"""The README.md of an export: a model card for people and for the hub. Not checksummed: it may be edited."""

import json
from collections.abc import Iterator
from typing import Any

from recap_ds.models.export_format import ADAPTER_NAME, VLM_NAME, ExportContents, ExportRecord, Results
from recap_ds.processing.contract import RobotContract

CARD_NAME = "README.md"


def model_card(record: ExportRecord, contents: ExportContents) -> str:
    sections = [
        _front_matter(contents),
        f"# {contents.config.name}",
        _introduction(record),
        *_usage(record),
        *_robot(contents.contract),
        _provenance(record, contents),
        *_results(contents.results, record.provenance.step),
        f"`{record.FILE_NAME}` has every file's size and sha256; loading checks them.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(contents: ExportContents) -> str:
    lines = ["library_name: recap_ds", "pipeline_tag: robotics"]
    name = contents.config.vlm_source.name
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):  # else a folder, or drawn at random
        lines.append(f"base_model: {json.dumps(name)}")
    lines.append("tags: [robotics, vision-language-action, recap, flow-matching]")
    return "\n".join(["---", *lines, "---"])


def _introduction(record: ExportRecord) -> str:
    if record.vlm_is_plain_transformers is None:
        return "A LoRA adapter in peft's format, of a policy trained with recap_ds (RECAP, arXiv 2511.14759)."
    parts = ", ".join(head.replace("_", " ") for head in record.heads)
    if record.provenance.imported_from is not None:
        what = f"a VLM and {parts}" if parts else "a VLM"
        return f"Published weights in the form of recap_ds: {what}, in {record.dtype}. Nothing of it was trained here."
    return (
        f"A vision-language-action model trained with recap_ds (RECAP, arXiv 2511.14759): a VLM and {parts}, "
        f"in {record.dtype}. Adapter: {record.adapter}."
    )


def _usage(record: ExportRecord) -> Iterator[str]:
    lines = []
    if "action_expert" in record.heads:
        lines += [
            "from recap_ds.models.robot import RobotPolicy",
            'policy = RobotPolicy.from_pretrained("path/to/this/folder", device="cuda")',
            "# or behind a websocket: recap-ds serve path/to/this/folder",
        ]
    elif record.heads:
        lines += [
            "from recap_ds import PiStarRECAPPolicy",
            'critic = PiStarRECAPPolicy.from_pretrained("path/to/this/folder")',
        ]
    if record.vlm_is_plain_transformers:
        lines += [
            "# or the VLM alone",
            "from transformers import AutoModelForImageTextToText",
            f'vlm = AutoModelForImageTextToText.from_pretrained("path/to/this/folder/{VLM_NAME}")',
        ]
    if record.adapter == "separate":
        base = "vlm" if record.vlm_is_plain_transformers else "the_model_it_was_trained_on"
        lines += [
            "from peft import PeftModel",
            f'vlm = PeftModel.from_pretrained({base}, "path/to/this/folder/{ADAPTER_NAME}")',
        ]
    if lines:
        yield "\n".join(["## Use", "", "```python", *lines, "```"])


def _robot(contract: RobotContract | None) -> Iterator[str]:
    if contract is None:
        return
    rows = {
        "cameras": ", ".join(contract.cameras),
        "state, action dims": f"{contract.state_dim}, {contract.action_dim}",
        "control rate": f"{contract.fps:g} per second",
    }
    tasks = [f"- {task.prompt}" for task in contract.tasks.values()]
    yield "\n".join(["## Robot", "", _table(rows), "", "Prompts it was trained on:", "", *tasks])


def _provenance(record: ExportRecord, contents: ExportContents) -> str:
    source = record.provenance
    rows = {
        "run": source.run,
        "imported from": source.imported_from,
        "step": source.step,
        "weights": {"ema": "average over training (EMA)", "raw": "of the last step"}.get(source.weights or ""),
        "checkpoint": source.format and f"{source.format} files, {source.world or 'unknown'} ranks",
        "checkpoint sha256": source.checkpoint_sha256,
        "stage": contents.config.training.stage,
        "VLM": contents.config.vlm_source.name,
        "config sha256": record.config_sha256,
        "data manifest": record.manifest_hash,
        "recap_ds": record.recap_ds_version,
    }
    known = {name: value for name, value in rows.items() if value is not None}
    return f"## Provenance\n\n{_table(known)}"


def _results(results: Results | None, step: int | None) -> Iterator[str]:
    if results is None:
        return
    where = (
        "this checkpoint" if results.step == step else f"the run's last step, {results.step}: not of this checkpoint"
    )
    figures = {name: "-" if value is None else f"{value:.4g}" for name, value in results.figures.items()}
    yield f"## Results\n\nHeld-out evaluation in training, of {where}.\n\n{_table(figures)}"


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
