"""A shard folder at a glance: counts and statistics as text, pictures as a contact sheet.

``recap-ds shards show FOLDER [--out PNG]``. P = stored picture side in pixels.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from recap_ds.batch import SOURCE_IDS
from recap_ds.config import SOURCES
from recap_ds.data.index import ShardIndex
from recap_ds.data.manifest import Manifest
from recap_ds.errors import UsageError
from recap_ds.processing.images import decode_jpeg

SHEET_COLUMNS = 6
# Small pictures are enlarged, large ones shrunk, to about this side.
CELL_PIXELS = 128
LABEL_PIXELS = 16


def describe(folder: str | Path, place: str | None = None) -> str:
    """Text of several lines. ``place``: what to call the folder, if not by its path."""
    manifest = Manifest.load(folder)
    indices = _load_indices(folder, manifest)
    return "\n\n".join(
        (_facts(place or folder, manifest), _sources(manifest), _tasks(manifest, indices), _statistics(manifest))
    )


def contact_sheet(folder: str | Path) -> Image.Image:
    """One row per (source, task) there is, with samples evenly spread over it, first camera first."""
    folder = Path(folder)
    manifest = Manifest.load(folder)
    indices = _load_indices(folder, manifest)
    rows = []
    for source in manifest.counts:
        for task in manifest.tasks:
            pictures = _pictures(folder, manifest, indices, source, task)
            if pictures:
                rows.append((f"{source} | {task}", pictures))
    height = CELL_PIXELS + LABEL_PIXELS
    sheet = Image.new("RGB", (SHEET_COLUMNS * CELL_PIXELS, len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, pictures) in enumerate(rows):
        draw.text((2, i * height + 2), label, fill="black")
        for j, picture in enumerate(pictures):
            cell = Image.fromarray(picture).resize((CELL_PIXELS - 2, CELL_PIXELS - 2))
            sheet.paste(cell, (j * CELL_PIXELS, i * height + LABEL_PIXELS))
    return sheet


def _load_indices(folder: str | Path, manifest: Manifest) -> list[ShardIndex]:
    return [ShardIndex.load(ShardIndex.path_of(Path(folder) / shard.name)) for shard in manifest.shards]


def _facts(folder: str | Path, manifest: Manifest) -> str:
    gigabytes = sum(shard.bytes for shard in manifest.shards) / 1e9
    return "\n".join(
        (
            f"{folder}: {manifest.num_samples} samples in {len(manifest.shards)} shards, {gigabytes:.3f} GB, "
            f"{manifest.content_hash()[:12]}",
            f"cameras {', '.join(manifest.cameras)} at {manifest.image_size} px; {manifest.state_dim} state dims, "
            f"{manifest.action_dim} action dims, {manifest.fps:g} fps",
            f"{manifest.action_width} actions per sample, TD window {manifest.td_horizon} frames; next observations: "
            f"{_yes(manifest.has_next)}; environment rewards: {_yes(manifest.has_rewards)}",
        )
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _sources(manifest: Manifest) -> str:
    header = ("source", "samples", "frames", "human frames", "episodes", "success", "failure", "truncated", "unknown")
    rows = [
        (
            source,
            counts.samples,
            counts.frames,
            counts.human_frames,
            counts.episodes,
            *(counts.outcomes[outcome] for outcome in header[5:]),
        )
        for source, counts in manifest.counts.items()
    ]
    return text_table(header, rows)


def _tasks(manifest: Manifest, indices: list[ShardIndex]) -> str:
    samples = {task: dict.fromkeys(SOURCES, 0) for task in manifest.tasks}
    for shard, index in zip(manifest.shards, indices, strict=True):
        for task, count in zip(index.tasks.tolist(), np.bincount(index.task, minlength=len(index.tasks)), strict=True):
            samples[task][shard.source] += int(count)
    header = ("task", "prompt", "episodes", "longest", *(f"{source} samples" for source in SOURCES))
    rows = [
        (name, task.prompt, task.episodes, task.longest, *samples[name].values())
        for name, task in manifest.tasks.items()
    ]
    return text_table(header, rows)


def _statistics(manifest: Manifest) -> str:
    header = ("feature", "dim", "mean", "std", "min", "q01", "q99", "max")
    rows = []
    for feature in ("state", "actions"):
        stats = manifest.merged_statistics(feature)
        for dim in range(stats.num_dims):
            columns = (stats.mean, stats.std, stats.min, stats.q01, stats.q99, stats.max)
            rows.append((feature, dim, *(f"{column[dim]:.4g}" for column in columns)))
    return text_table(header, rows)


def text_table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """Columns of words to the left, of numbers to the right."""
    cells = [header, *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(row[i].lstrip("-")[:1].isdigit() for row in cells[1:]) for i in range(len(header))]
    lines = (
        "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(*row, strict=True))
        for row in ((row, widths, numeric) for row in cells)
    )
    return "\n".join(line.rstrip() for line in lines)


def _pictures(folder: Path, manifest: Manifest, indices: list[ShardIndex], source: str, task: str) -> list[np.ndarray]:
    """Up to SHEET_COLUMNS pictures [P, P, 3] of the first camera the samples have."""
    places = []
    for number, index in enumerate(indices):
        if task in index.tasks:
            task_id = index.tasks.tolist().index(task)
            chosen = np.flatnonzero((index.task == task_id) & (index.source == SOURCE_IDS[source]))
            places += [(number, row) for row in chosen.tolist()]
    spread = np.linspace(0, len(places) - 1, min(SHEET_COLUMNS, len(places))).round().astype(int)
    return [_read_picture(folder, manifest, indices, *places[i]) for i in spread]


def _read_picture(folder: Path, manifest: Manifest, indices: list[ShardIndex], number: int, row: int) -> np.ndarray:
    index, path = indices[number], folder / manifest.shards[number].name
    suffixes = index.suffixes.tolist()
    columns = [suffixes.index(f"{camera}.jpg") for camera in manifest.cameras if f"{camera}.jpg" in suffixes]
    column = next(column for column in columns if index.offsets[row, column] >= 0)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        data = os.pread(descriptor, int(index.sizes[row, column]), int(index.offsets[row, column]))
    finally:
        os.close(descriptor)
    try:
        return decode_jpeg(data)
    except ValueError as error:
        raise UsageError(f"{path}: {index.keys[row]}: {error}; see 'recap-ds shards verify {folder}'") from None
