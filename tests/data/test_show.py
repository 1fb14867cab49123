import numpy as np

from recap_ds.data.manifest import Manifest
from recap_ds.data.show import CELL_PIXELS, LABEL_PIXELS, SHEET_COLUMNS, contact_sheet, describe
from tests.data.made_episodes import FlatFrames, made_episode, write


def written(folder):
    human = np.array([0, 0, 0, 1, 1, 0, 0], dtype=bool)
    episodes = [
        made_episode(0, task="b", prompt="sort the blocks"),
        made_episode(1, source="auto", outcome="failure"),
        made_episode(2, source="intervention", human=human),
    ]
    write(folder, episodes)
    return Manifest.load(folder)


def rows_of(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in text.splitlines() if line}


def test_counts_are_those_of_the_episodes(tmp_path):
    manifest = written(tmp_path)
    text = describe(tmp_path)
    rows = rows_of(text)
    # samples, frames, human frames, episodes, success, failure, truncated, unknown
    assert rows["demo"][1:] == ["7", "7", "7", "1", "1", "0", "0", "0"]
    assert rows["auto"][1:] == ["12", "12", "0", "2", "1", "1", "0", "0"]
    assert rows["intervention"][1:] == ["2", "2", "2", "1", "1", "0", "0", "0"]
    # episodes, longest, demo, auto and intervention samples
    assert rows["b"][-5:] == ["1", "7", "7", "0", "0"]
    assert "sort  sort the blocks         2        7             0            12                     2" in text
    assert manifest.content_hash()[:12] in text and "21 samples in 3 shards" in text


def test_statistics_are_there_for_every_dim(tmp_path):
    written(tmp_path)
    lines = [line.split() for line in describe(tmp_path).splitlines() if line.startswith(("state", "actions"))]
    assert [line[:2] for line in lines] == [["state", "0"], ["state", "1"]] + [["actions", str(i)] for i in range(3)]
    assert lines[0][2:5] == ["3", "2", "0"] and lines[0][-1] == "6"  # mean, std, min, max of 0..6


def test_the_sheet_has_a_labelled_row_per_source_and_task(tmp_path):
    written(tmp_path)
    sheet = np.asarray(contact_sheet(tmp_path))
    height = CELL_PIXELS + LABEL_PIXELS
    assert sheet.shape == (3 * height, SHEET_COLUMNS * CELL_PIXELS, 3)
    for row in range(3):
        label = sheet[row * height : row * height + LABEL_PIXELS]
        assert label.min() < 100
    # The intervention row has two pictures only: the rest is blank.
    assert (sheet[2 * height + LABEL_PIXELS :, 2 * CELL_PIXELS :] == 255).all()
    greys = {int(sheet[2 * height + LABEL_PIXELS + 60, i * CELL_PIXELS + 60, 0]) for i in range(2)}
    assert all(min(abs(grey - want) for want in (21, 28)) <= 2 for grey in greys) and len(greys) == 2


def test_the_first_camera_is_shown(tmp_path):
    write(tmp_path, [made_episode(read_frames=FlatFrames(("wrist", "front")), num_frames=1)])
    assert contact_sheet(tmp_path).size == (SHEET_COLUMNS * CELL_PIXELS, CELL_PIXELS + LABEL_PIXELS)
