"""Sidecars: what is written comes back by sample id, and what does not belong to the shards is refused."""

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.data import array_file
from recap_ds.data.label_records import LabelRecord, TaskLabels, ValuesRecord, check_tag
from recap_ds.data.labels import LabelColumns, LabelSet, labels_folder, read_labels, write_labels
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.values import open_values, read_values, values_folder, values_problem, write_values
from recap_ds.errors import UsageError
from tests.data.tiny_shards import flat_episode, mixed_set, write_tiny
from tests.label.made_values import made_record, made_settings, store_values


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory) -> ShardSet:
    return mixed_set(tmp_path_factory.mktemp("sidecars"))


def random_columns(num_samples: int, seed: int = 0) -> LabelColumns:
    generator = np.random.default_rng(seed)
    value, returns, advantage = generator.normal(size=(3, num_samples)).astype(np.float32)
    value[3] = returns[::7] = advantage[::5] = np.nan
    return LabelColumns(value, returns, advantage, generator.integers(0, 3, num_samples))


def label_record(values: ValuesRecord, sigma: dict[str, float | None]) -> LabelRecord:
    counts = {"num_samples": 1, "num_forced": 0, "num_known": 1, "num_positive": 1, "forced_fraction": 0.0}
    tasks = {
        name: TaskLabels(**counts, positive_fraction=1.0, threshold=None, sigma=value) for name, value in sigma.items()
    }
    return LabelRecord(
        values_tag="t", values=values, settings=made_settings(), lookahead_frames=50, tasks=tasks, files={}
    )


def write_random_labels(shard_set: ShardSet, tag: str, seed: int = 0) -> LabelColumns:
    columns = random_columns(shard_set.num_samples, seed)
    write_labels(shard_set, tag, label_record(made_record(shard_set), {"cube": 0.25, "cup": None}), columns)
    return columns


def test_values_come_back_by_sample_id_with_what_is_not_known(shard_set):
    columns = random_columns(shard_set.num_samples)
    stored = store_values(shard_set, "plain", columns.value)
    np.testing.assert_array_equal(stored.value, columns.value)
    assert stored.value.dtype == np.float32 and np.isnan(stored.value[3]) and stored.action_advantage is None
    assert stored.record == made_record(shard_set)
    stored = store_values(shard_set, "iql", columns.value, columns.advantage, critic="iql")
    np.testing.assert_array_equal(stored.action_advantage, columns.advantage)


def test_keys_are_ranked_over_all_shards(shard_set):
    stored = store_values(shard_set, "ranks", np.zeros(shard_set.num_samples, np.float32))
    folder = values_folder(shard_set.folder, "ranks")
    keys = [
        key
        for entry in shard_set.manifest.shards
        for key in pq.read_table(folder / Path(entry.name).with_suffix(".parquet").name)["key"].to_pylist()
    ]
    assert [keys[i] for i in np.argsort(stored.key_rank)] == sorted(keys)


def test_labels_come_back_by_sample_id(shard_set):
    columns = write_random_labels(shard_set, "back")
    _, found = read_labels(shard_set, "back")
    for wanted, got in zip(columns, found, strict=True):
        np.testing.assert_array_equal(got, wanted)
    labels = pickle.loads(pickle.dumps(LabelSet.open(shard_set, "back")))
    np.testing.assert_array_equal(labels.advantage, np.nan_to_num(columns.advantage))
    np.testing.assert_array_equal(labels.indicator, columns.indicator)
    assert labels.advantage.dtype == np.float32 and labels.indicator.dtype == np.int8
    assert list(shard_set.manifest.tasks) == ["cube", "cup"] and labels.sigma.tolist() == [0.25, np.inf]


def test_labels_of_a_large_set_are_mapped(shard_set, monkeypatch, tmp_path):
    columns = write_random_labels(shard_set, "mapped")
    monkeypatch.setattr(array_file, "MAX_SAMPLES_IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for _ in range(2):  # made, and found
        labels = pickle.loads(pickle.dumps(LabelSet.open(shard_set, "mapped")))
        np.testing.assert_array_equal(labels.advantage, np.nan_to_num(columns.advantage))
        np.testing.assert_array_equal(labels.indicator, columns.indicator)
    assert len(pickle.dumps(labels.stored)) < 300 and len(list(tmp_path.rglob("*.arrays"))) == 1
    changed = write_random_labels(shard_set, "mapped", seed=1)
    np.testing.assert_array_equal(LabelSet.open(shard_set, "mapped").indicator, changed.indicator)


def test_label_files_are_plain_tables_beside_the_shards(shard_set):
    columns = write_random_labels(shard_set, "plain")
    entry, shard = shard_set.manifest.shards[2], 2
    table = pq.read_table(labels_folder(shard_set.folder, "plain") / entry.name.replace(".tar", ".parquet"))
    assert table.column_names == ["key", "episode", "frame", "value", "return", "advantage", "indicator"]
    first = int(shard_set.shard_starts[shard])
    assert table.num_rows == entry.num_samples
    assert set(table["indicator"].to_pylist()) <= set(INDICATOR_IDS)
    row = table.slice(0, 1).to_pylist()[0]
    assert row["episode"] == shard_set.episodes[shard_set.table.episode[first]]
    assert (row["frame"], INDICATOR_IDS[row["indicator"]]) == (shard_set.table.frame[first], columns.indicator[first])


def test_the_same_labels_are_the_same_bytes(shard_set):
    write_random_labels(shard_set, "one")
    write_random_labels(shard_set, "two")
    one, two = (sorted(labels_folder(shard_set.folder, tag).iterdir()) for tag in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) == len(shard_set.manifest.shards) + 1
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_an_unknown_tag_lists_those_there_are(tmp_path):
    shards = write_tiny(tmp_path, [flat_episode(0, 9)])
    with pytest.raises(UsageError, match="no labels with the tag 'x'; there are none"):
        LabelSet.open(shards, "x")
    columns = random_columns(shards.num_samples)
    write_labels(shards, "b", label_record(made_record(shards), {"cube": 0.1}), columns)
    write_labels(shards, "a", label_record(made_record(shards), {"cube": 0.1}), columns)
    labels_folder(tmp_path, "unfinished").mkdir()
    with pytest.raises(UsageError, match=r"no labels with the tag 'x'; there are a, b$"):
        LabelSet.open(shards, "x")
    with pytest.raises(UsageError, match="no values with the tag 'a'; there are none"):
        read_values(shards, "a")


def test_labels_of_other_shards_are_refused(tmp_path):
    shards = write_tiny(tmp_path, [flat_episode(0, 9)])
    store_values(shards, "t", np.zeros(9, np.float32))
    write_labels(shards, "t", label_record(made_record(shards), {"cube": 0.1}), random_columns(9))
    LabelSet.open(shards, "t")
    grown = write_tiny(tmp_path, [flat_episode(0, 9, "auto")])
    for read in (LabelSet.open, read_values):
        with pytest.raises(UsageError, match=r"made for other shards .* with a new tag"):
            read(grown, "t")


def test_labels_in_another_length_are_refused(shard_set):
    write_random_labels(shard_set, "lengths")
    longest = {name: task.longest for name, task in shard_set.manifest.tasks.items()}
    LabelSet.open(shard_set, "lengths", longest)
    with pytest.raises(UsageError, match=r"task 'cup' is measured in 40 frames here.*set value\.max_length\.cup=11"):
        LabelSet.open(shard_set, "lengths", longest | {"cup": 40})


def test_missing_and_changed_label_files_are_named(shard_set):
    write_random_labels(shard_set, "hurt")
    path = labels_folder(shard_set.folder, "hurt") / "demo-000001.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"demo-000001\.parquet was changed or damaged"):
        LabelSet.open(shard_set, "hurt")
    path.unlink()
    with pytest.raises(UsageError, match=r"demo-000001\.parquet is missing"):
        LabelSet.open(shard_set, "hurt")


def test_missing_and_damaged_values_are_named(shard_set):
    """Every way a file can be wrong; one of these is a single bit, which parquet itself would not notice."""
    store_values(shard_set, "hurt", np.zeros(shard_set.num_samples, np.float32))
    folder, record = values_folder(shard_set.folder, "hurt"), made_record(shard_set)
    demo, auto = folder / "demo-000000.parquet", folder / "auto-000000.parquet"
    data, done = demo.read_bytes(), demo.with_suffix(".json").read_bytes()
    shard = [entry.name for entry in shard_set.manifest.shards].index("demo-000000.tar")

    def said() -> str:
        with pytest.raises(UsageError, match=r"; run launch/label\.py again with this tag") as caught:
            read_values(shard_set, "hurt")
        assert values_problem(shard_set, folder, shard, record) in str(caught.value)
        return str(caught.value)

    demo.write_bytes(data[: len(data) // 2])
    assert f"demo-000000.parquet has {len(data) // 2} bytes instead of {len(data)}" in said()
    flipped = bytearray(data)
    flipped[len(data) // 3] ^= 4
    demo.write_bytes(flipped)
    assert "demo-000000.parquet was changed or damaged" in said()
    demo.write_bytes(auto.read_bytes())
    assert "demo-000000.parquet" in said()
    demo.unlink()
    assert "demo-000000.parquet is missing" in said()
    demo.write_bytes(data)
    for text, what in ((done[:-20], "is cut off or not JSON"), (done.replace(b"job", b"jab"), "its checksum differs")):
        demo.with_suffix(".json").write_bytes(text)
        assert what in said()
    demo.with_suffix(".json").unlink()
    assert "demo-000000.parquet cannot be checked" in said()
    demo.with_suffix(".json").write_bytes(done)
    assert values_problem(shard_set, folder, shard, record) is None
    read_values(shard_set, "hurt")


def test_values_left_by_another_job_count_for_nothing(shard_set):
    """Somebody removed values.json, or it was damaged, and another critic's job came to the same folder."""
    zeros = np.zeros(shard_set.num_samples, np.float32)
    store_values(shard_set, "left", zeros)
    folder = values_folder(shard_set.folder, "left")
    (folder / "values.json").write_text("{")
    with pytest.raises(UsageError, match=r"values\.json: is cut off.*remove it and run .* values that are sound stay"):
        read_values(shard_set, "left")
    (folder / "values.json").unlink()
    other = made_record(shard_set).model_copy(update={"checkpoint_hash": "d" * 64})
    open_values(shard_set.folder, "left", other)
    assert values_problem(shard_set, folder, 0, made_record(shard_set)) is None
    assert "is of another job" in values_problem(shard_set, folder, 0, other)
    with pytest.raises(UsageError, match=r"auto-000000\.parquet is of another job than values\.json"):
        read_values(shard_set, "left")


def test_a_damaged_record_of_labels_says_how_to_mend_it(shard_set):
    write_random_labels(shard_set, "record")
    path = labels_folder(shard_set.folder, "record") / "labels.json"
    text = path.read_text()
    for damaged, what in ((text[:-9], "cut off"), (text.replace("cube", "cuba"), "its checksum differs")):
        path.write_text(damaged)
        with pytest.raises(UsageError, match=rf"labels\.json: .*{what}.*; remove it and make the labels again"):
            LabelSet.open(shard_set, "record")


def test_labels_of_a_rethreshold_are_mended_by_one(shard_set):
    columns = random_columns(shard_set.num_samples)
    record = label_record(made_record(shard_set), {"cube": 0.25, "cup": None})
    write_labels(shard_set, "less", record, columns)
    (labels_folder(shard_set.folder, "less") / "auto-000000.parquet").unlink()
    with pytest.raises(UsageError, match=r"auto-000000.parquet is missing; remove labels\.json .* from the tag 't'"):
        LabelSet.open(shard_set, "less")


def test_a_tag_goes_on_only_with_the_same_critic(shard_set):
    record = made_record(shard_set)
    folder = open_values(shard_set.folder, "mine", record)
    write_values(shard_set, folder, 0, record, np.zeros(shard_set.manifest.shards[0].num_samples, np.float32), None)
    assert open_values(shard_set.folder, "mine", record) == folder
    changes = {"checkpoint_hash": "d" * 64, "precision": "bfloat16", "max_length": {"cube": 40, "cup": 11}}
    for name, value in changes.items():
        with pytest.raises(UsageError, match=rf"--tag mine: .* another job \({name} differs\)"):
            open_values(shard_set.folder, "mine", record.model_copy(update={name: value}))


@pytest.mark.parametrize("tag", ["", "..", "a/b", ".hidden", "a b", "-x"])
def test_a_tag_is_a_plain_name(tag):
    with pytest.raises(UsageError, match="--tag"):
        check_tag(tag, "--tag")
    assert check_tag("v1.2_x-y", "--tag") == "v1.2_x-y"
