import shutil

import pytest

from recap_ds.data.lerobot.fingerprint import dataset_fingerprint
from recap_ds.data.lerobot.metadata import load_metadata
from tests.data.lerobot.tiny_dataset import DATA_FILE, VIDEO_FILE, edit_column, write_dataset


def fingerprint(root, labels=None):
    return dataset_fingerprint(load_metadata(root), labels)


@pytest.mark.parametrize("change", ["a number", "a video", "labels", "a sidecar"])
def test_a_copy_is_the_same_and_any_change_shows(tmp_path, change):
    root = write_dataset(tmp_path / "set", (4, 3))
    before = fingerprint(root)
    copy = shutil.copytree(root, tmp_path / "copy")
    assert fingerprint(copy) == before
    if change == "a number":
        edit_column(copy / DATA_FILE, "action", lambda values: values.__setitem__(5, [0.5, 0.5]))
    elif change == "a video":
        data = bytearray((copy / VIDEO_FILE).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / VIDEO_FILE).write_bytes(data)
    elif change == "labels":
        (copy / "meta/episode_labels.csv").write_text("episode_index,success\n0,true\n")
    else:
        (copy / "sarm_progress.parquet").write_bytes(b"")
    assert fingerprint(copy) != before


def test_a_labels_file_counts_by_what_it_says(tmp_path):
    root, labels = write_dataset(tmp_path / "set", (4,)), tmp_path / "labels.csv"
    labels.write_text("episode_index,success\n0,true\n")
    one = fingerprint(root, labels)
    labels.write_text("episode_index,success\n0,false\n")
    assert len({fingerprint(root), one, fingerprint(root, labels)}) == 3
