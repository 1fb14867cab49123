"""Labels as pictures: values along episodes, advantages per task and source, the frames around the extremes.

``recap-ds labels show SHARDS --tag T``. Drawn with Pillow alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.batch import CONTROL_IDS, OUTCOME_IDS, SOURCE_IDS
from recap_ds.data.label_records import LabelRecord
from recap_ds.data.labels import LabelColumns, read_labels
from recap_ds.data.shard_set import DamagedSample, ShardSet
from recap_ds.label.plots import Axes, Panel, histogram_panel, stack_panels
from recap_ds.processing.images import decode_jpeg

EPISODES_PER_GROUP = 2
MAX_TASKS = 24
NUM_EXTREMES = 4  # highest and lowest advantages, each of another episode
NUM_AROUND = 5  # frames shown around each
CELL_PIXELS, LABEL_PIXELS = 128, 16
BLUE, GREY, GREEN, RED, SHADE = (31, 90, 180), (150, 150, 150), (30, 140, 60), (190, 40, 40), (250, 235, 205)


class Labelled(NamedTuple):
    shard_set: ShardSet
    record: LabelRecord
    columns: LabelColumns


def draw_labels(shard_set: ShardSet, tag: str, out: Path) -> list[Path]:
    """Writes values.png, advantages.png and extremes.png into ``out`` and returns their paths."""
    labelled = Labelled(shard_set, *read_labels(shard_set, tag))
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"values": value_curves(labelled), "advantages": advantage_histograms(labelled)}
    if (~np.isnan(labelled.columns.advantage)).any():
        pictures["extremes"] = extreme_frames(labelled)
    paths = []
    for name, picture in pictures.items():
        paths.append(out / f"{name}.png")
        picture.save(paths[-1], format="PNG")
    return paths


def value_curves(labelled: Labelled) -> Image.Image:
    """Value (blue) and return (grey) along a few episodes per task, source and outcome.

    Below, what is positive (green) and negative (red); shaded where a human acts.
    """
    return stack_panels([_episode_panel(labelled, episode) for episode in _chosen_episodes(labelled)], num_columns=3)


def _chosen_episodes(labelled: Labelled) -> Iterator[int]:
    """The episodes with the lowest ids of each (task, source, outcome); an episode of two sources is shown once."""
    table, seen = labelled.shard_set.table, set()
    group = (table.task.astype(np.int64) * len(SOURCE_IDS) + table.source) * len(OUTCOME_IDS) + table.outcome
    for number in np.unique(group[table.task < MAX_TASKS]):
        fresh = [episode for episode in np.unique(table.episode[group == number]).tolist() if episode not in seen]
        seen.update(fresh[:EPISODES_PER_GROUP])
        yield from fresh[:EPISODES_PER_GROUP]


def _episode_panel(labelled: Labelled, episode: int) -> Image.Image:
    shard_set, _, columns = labelled
    rows = _rows_of_episode(shard_set, episode)
    table, first = shard_set.table, int(rows[0])
    outcome = list(OUTCOME_IDS)[table.outcome[first]]
    task = list(shard_set.manifest.tasks)[table.task[first]]
    frames = table.frame[rows]
    panel = Panel(
        f"{shard_set.episodes[episode]} | {task} | {outcome}",
        Axes(0.0, float(max(table.episode_length[first] - 1, 1)), -1.0, 0.0),
    )
    for frame, control in zip(frames, table.control[rows], strict=True):
        if control == CONTROL_IDS["human"]:
            panel.shade(float(frame), SHADE)
    panel.line(frames, columns.returns[rows], GREY)
    panel.line(frames, columns.value[rows], BLUE)
    for name, color in (("positive", GREEN), ("negative", RED)):
        panel.ticks(frames[columns.indicator[rows] == INDICATOR_IDS[name]], color)
    return panel.image


def advantage_histograms(labelled: Labelled) -> Image.Image:
    """One panel per task and source, all of a task on one scale; the line is the task's threshold."""
    shard_set, record, columns = labelled
    table, panels = shard_set.table, []
    known = ~np.isnan(columns.advantage)
    for task, name in list(enumerate(shard_set.manifest.tasks))[:MAX_TASKS]:
        of_task = columns.advantage[known & (table.task == task)]
        if not len(of_task):
            continue
        threshold = record.tasks[name].threshold
        # A threshold that tasks share may lie beyond all that this one has.
        shown = of_task if threshold is None else np.append(of_task, threshold)
        low, high = float(shown.min()), float(shown.max())
        for source, source_id in SOURCE_IDS.items():
            values = columns.advantage[known & (table.task == task) & (table.source == source_id)]
            title = f"{name} | {source}: {len(values)} samples"
            panels.append(histogram_panel(title, values, low, high, threshold, BLUE, RED))
    return stack_panels(panels, num_columns=len(SOURCE_IDS))


def extreme_frames(labelled: Labelled) -> Image.Image:
    """A row per extreme sample: the frames around it, half a lookahead apart, the sample itself in the middle."""
    rows = [("highest", sample) for sample in _extremes(labelled, highest=True)]
    rows += [("lowest", sample) for sample in _extremes(labelled, highest=False)]
    height = CELL_PIXELS + LABEL_PIXELS
    sheet = Image.new("RGB", (NUM_AROUND * CELL_PIXELS, len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    shard_set, columns = labelled.shard_set, labelled.columns
    for number, (side, sample) in enumerate(rows):
        table = shard_set.table
        name = f"{shard_set.episodes[table.episode[sample]]} frame {table.frame[sample]}"
        text = f"{side}: {columns.advantage[sample]:+.4f}  {list(SOURCE_IDS)[table.source[sample]]}  {name}"
        draw.text((2, number * height + 2), text, fill="black")
        for place, around in enumerate(_samples_around(labelled, sample)):
            picture = _picture(shard_set, around)
            if picture is not None:
                cell = Image.fromarray(picture).resize((CELL_PIXELS - 2, CELL_PIXELS - 2))
                sheet.paste(cell, (place * CELL_PIXELS, number * height + LABEL_PIXELS))
    return sheet


def _extremes(labelled: Labelled, highest: bool) -> list[int]:
    """Not-forced samples if there are any, each of another episode: neighbours would show one event again and again."""
    shard_set, _, columns = labelled
    known = np.flatnonzero(~np.isnan(columns.advantage))
    own = known[shard_set.table.source[known] == SOURCE_IDS["auto"]]
    candidates = own if len(own) else known
    order = candidates[np.argsort(columns.advantage[candidates] * (-1 if highest else 1), kind="stable")]
    _, first = np.unique(shard_set.table.episode[order], return_index=True)
    return order[np.sort(first)][:NUM_EXTREMES].tolist()


def _samples_around(labelled: Labelled, sample: int) -> list[int]:
    shard_set, frames_ahead = labelled.shard_set, labelled.record.lookahead_frames
    rows = _rows_of_episode(shard_set, int(shard_set.table.episode[sample]))
    frames = shard_set.table.frame[rows]
    step = max(1, (frames_ahead if frames_ahead is not None else len(rows) // 2) // 2)
    wanted = int(shard_set.table.frame[sample]) + step * (np.arange(NUM_AROUND) - NUM_AROUND // 2)
    return [int(rows[np.abs(frames - frame).argmin()]) for frame in wanted]


def _rows_of_episode(shard_set: ShardSet, episode: int) -> np.ndarray:
    """Sample ids in the order of frames."""
    rows = np.flatnonzero(shard_set.table.episode == episode)
    return rows[np.argsort(shard_set.table.frame[rows])]


def _picture(shard_set: ShardSet, sample: int) -> np.ndarray | None:
    """[P, P, 3] of the first camera the sample has; None where it is damaged."""
    try:
        members = shard_set.read_members(sample)
    except DamagedSample:
        return None
    names = [f"{camera}.jpg" for camera in shard_set.manifest.cameras if f"{camera}.jpg" in members]
    return decode_jpeg(members[names[0]])
