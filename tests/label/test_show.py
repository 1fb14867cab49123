"""Pictures and tables of labels: what is drawn where."""

import numpy as np
import pytest
from PIL import Image

from recap_ds.data.labels import read_labels, write_labels
from recap_ds.data.shard_set import ShardSet
from recap_ds.label.assign import assign_labels
from recap_ds.label.plots import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, Panel, histogram_panel, stack_panels
from recap_ds.label.show import NUM_AROUND, draw_labels
from recap_ds.label.table import label_table
from tests.data.tiny_shards import mixed_set
from tests.label.made_values import column_of, made_settings, store_values

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory) -> ShardSet:
    shards = mixed_set(tmp_path_factory.mktemp("show"))
    stored = store_values(shards, "t", column_of(shards, lambda name, frame: -((len(name) * 7 + frame * 5) % 11) / 11))
    write_labels(shards, "t", *assign_labels(shards, stored, "t", made_settings(0.4, "positive", lookahead=2)))
    return shards


def test_the_table_counts_tasks_and_groups(shard_set):
    lines = label_table(shard_set, "t").splitlines()
    (cube,) = [line.split() for line in lines if line.startswith("cube")]
    # L_task, samples, forced, ranked, positive: 6 demos, 8 + 6 x 4 frames of the policy, 6 x 6 corrected.
    assert cube[1:6] == ["11", "184", "96", "88", "35"]
    (failed,) = [line.split() for line in lines if line.split()[:2] == ["auto", "failure"]]
    assert failed[2] == "32" and float(failed[5]) == -1.0
    assert [line.split()[3] for line in lines if line.startswith("intervention")] == ["1.0000"]
    assert "step 500" in lines[1] and "2 frames" in lines[2]
    assert lines[2].endswith("0.4 of those not forced are positive; demonstrations are positive")


def test_the_table_names_what_recap_does_not_do(shard_set):
    record, columns = read_labels(shard_set, "t")
    label = record.settings.label.model_copy(update={"shuffle": "labels", "corrections": "labelled"})
    settings = record.settings.model_copy(update={"label": label})
    write_labels(shard_set, "other", record.model_copy(update={"settings": settings}), columns)
    told = label_table(shard_set, "other").splitlines()[2]
    assert "demonstrations are positive before the shuffle; label.corrections=labelled; label.shuffle=labels" in told


def test_three_pictures_are_drawn(shard_set, tmp_path):
    paths = draw_labels(shard_set, "t", tmp_path / "pictures")
    assert [path.name for path in paths] == ["values.png", "advantages.png", "extremes.png"]
    sizes = {}
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and len(picture.getcolors(2**24)) > 3
            sizes[path.stem] = picture.size
    assert sizes["advantages"] == (3 * WIDTH, 2 * HEIGHT), "a panel per source in a row, a row per task"
    assert sizes["extremes"][0] == NUM_AROUND * 128 and sizes["values"][0] == 3 * WIDTH


def test_the_sample_itself_stands_in_the_middle(shard_set, tmp_path):
    paths = draw_labels(shard_set, "t", tmp_path)
    with Image.open(paths[2]) as picture:
        pixels = np.asarray(picture)
    # The pictures are grey, 40 + frame; frames of a row are a step of one apart, or at the episode's edge.
    centers = np.arange(NUM_AROUND) * 128 + 64
    levels = pixels[16 + 64, centers, 0].astype(int)
    assert set(np.diff(levels)) <= {0, 1} and levels.max() > levels.min()


def test_a_line_goes_through_its_points_and_breaks_where_nothing_is_known():
    panel = Panel("", Axes(0.0, 4.0, -1.0, 0.0))
    panel.line(np.arange(5), np.array([-1.0, -0.5, np.nan, -0.5, 0.0]), RED)
    pixels = np.asarray(panel.image)
    is_red = (pixels == RED).all(axis=2)
    columns = np.linspace(LEFT, WIDTH - RIGHT, 5).round().astype(int)
    assert is_red[:, columns[0] + 2].any() and is_red[:, columns[4] - 2].any()
    assert not is_red[:, columns[1] + 3 : columns[3] - 2].any()
    rows = np.flatnonzero(is_red[:, columns[1]])
    assert abs(rows.mean() - (TOP + HEIGHT - BOTTOM) / 2) < 3


def test_a_histogram_has_its_mass_where_the_values_are():
    values = np.concatenate([np.full(30, -0.9), np.full(10, 0.9)])
    picture = histogram_panel("", values, -1.0, 1.0, 0.0, BLUE, RED)
    pixels = np.asarray(picture)
    blue = (pixels == BLUE).all(axis=2)
    middle = (LEFT + WIDTH - RIGHT) // 2
    left, right = (half.any(axis=1).sum() for half in (blue[:, :middle], blue[:, middle:]))
    assert left == pytest.approx(3 * right, abs=2) and right > 30
    assert (pixels[TOP + 2, middle - 1 : middle + 2] == RED).all(axis=1).any()
    constant = histogram_panel("", np.zeros(4), 0.0, 0.0, None, BLUE, RED)
    assert (np.asarray(constant) == BLUE).all(axis=2).any()


def test_panels_are_stacked_row_by_row():
    panels = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in (RED, BLUE, RED)]
    sheet = stack_panels(panels, num_columns=2)
    assert sheet.size == (2 * WIDTH, 2 * HEIGHT)
    corners = [(5, 5), (WIDTH + 5, 5), (5, HEIGHT + 5), (WIDTH + 5, HEIGHT + 5)]
    assert [sheet.getpixel(corner) for corner in corners] == [RED, BLUE, RED, (255, 255, 255)]
