import os
import pickle
import shutil

import numpy as np
import pytest

from recap_ds.config import DataConfig
from recap_ds.data import baseline, fetch, remote_set
from recap_ds.data.baseline import mean_actions
from recap_ds.data.cache import ShardCache
from recap_ds.data.index import ShardIndex
from recap_ds.data.labels import labels_folder, read_labels
from recap_ds.data.manifest import MANIFEST_NAME, Manifest
from recap_ds.data.shard_set import DamagedSample, ShardSet
from recap_ds.data.verify import verify_shards
from recap_ds.errors import RunFailed, UsageError
from tests.data.shard_server import serve
from tests.data.test_labels import write_random_labels
from tests.data.test_loader import assert_equal, dataset_of, load
from tests.data.tiny_shards import flat_episode, mixed_set, tiny_config, write_tiny


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    mixed_set(folder)
    return folder


@pytest.fixture
def store(made, tmp_path):
    shutil.copytree(made, tmp_path / "store")
    with serve(tmp_path / "store") as server:
        yield server


def settings(tmp_path, **changes) -> dict:
    values = {"cache_folder": str(tmp_path / "cache"), "num_workers": 0, "held_out_fraction": 0.0}
    return {**values, "fetch_patience_seconds": 5, **changes}


def open_set(store, tmp_path, **changes) -> ShardSet:
    return ShardSet.open(store.url, DataConfig(**settings(tmp_path, **changes)))


def test_a_remote_set_is_the_local_one(store, made, tmp_path):
    local, remote = ShardSet.open(made), open_set(store, tmp_path)
    assert remote.manifest == local.manifest and remote.place == store.url
    for mine, other in zip(local.table, remote.table, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert not [name for name in store.requests if name.endswith(".tar")]  # none before it is read
    config = tiny_config(data=settings(tmp_path))
    batches = load(dataset_of(local, config), config, num_steps=12)
    assert_equal(batches, load(dataset_of(remote, config), config, num_steps=12))
    assert max(store.requests.values()) == 1
    # A second run asks for the manifest alone; a copy, as workers get it, opens files of its own.
    again = pickle.loads(pickle.dumps(open_set(store, tmp_path)))
    assert again.read_members(0) == local.read_members(0)
    assert store.requests.pop(MANIFEST_NAME) == 2 and max(store.requests.values()) == 1


def test_the_order_does_not_depend_on_the_network(store, made, tmp_path):
    store.drop_every, store.truncate = 4, {"auto-000001.tar", "demo-000000.index.npz", MANIFEST_NAME}
    remote = open_set(store, tmp_path)
    smallest = 3 * max(entry.bytes for entry in remote.manifest.shards) / 2**30
    config = tiny_config(data=settings(tmp_path, max_cache_gib=smallest))
    remote = ShardSet.open(store.url, config.data)
    local = dataset_of(ShardSet.open(made), config)
    assert_equal(load(local, config, num_steps=12), load(dataset_of(remote, config), config, num_steps=12))
    assert sum(path.stat().st_size for path in remote.remote.cache.shards.iterdir()) <= smallest * 2**30


def test_a_copy_elsewhere_is_the_same_set(store, made, tmp_path):
    first = open_set(store, tmp_path)
    first.read_members(0)
    second = ShardSet.open(f"pipe:cat {made}/{{name}}", DataConfig(**settings(tmp_path)))
    assert second.folder == first.folder
    assert second.manifest.content_hash() == ShardSet.open(made).manifest.content_hash()
    assert second.read_members(0) == first.read_members(0)
    assert len(list(first.remote.cache.shards.glob("*.tar"))) == 1


def test_a_changed_set_is_read_anew(store, tmp_path):
    before = open_set(store, tmp_path)
    shutil.rmtree(store.folder)
    after = write_tiny(store.folder, [flat_episode(i, 9) for i in range(3)])
    now = open_set(store, tmp_path)
    assert now.manifest == after.manifest and now.folder != before.folder
    assert now.read_members(0) == after.read_members(0)


def test_lost_shards_are_damage_and_asked_for_once(store, made, tmp_path):
    lost, wrong = "demo-000001.tar", "auto-000000.tar"
    (store.folder / lost).unlink()
    with open(store.folder / wrong, "r+b") as file:
        file.seek(2000)
        file.write(b"damage")
    remote, local = open_set(store, tmp_path), ShardSet.open(made)
    names = [entry.name for entry in remote.manifest.shards]
    for sample in range(remote.num_samples):
        name = names[remote.shard_of(sample)]
        if name in (lost, wrong):
            with pytest.raises(DamagedSample, match=f"^{name}: sample '.*': cannot be fetched: {name}: "):
                remote.read_members(sample)
        else:
            assert remote.read_members(sample) == local.read_members(sample)
    assert store.requests[lost] == 1 and store.requests[wrong] == fetch.MAX_WRONG


def test_a_cached_shard_that_went_bad_is_mended(store, made, tmp_path):
    remote = open_set(store, tmp_path)
    wanted = remote.read_members(0)
    path = remote.remote.cache.path_of(remote.manifest.shards[0])
    with open(path, "r+b") as file:
        file.seek(int(remote.table.start[0]))
        file.write(bytes(100))
    assert remote.read_members(0) == wanted
    assert store.requests[remote.manifest.shards[0].name] == 2
    os.truncate(path, 100)  # while it is open
    with pytest.raises(DamagedSample, match="cut short"):  # a disk that does this twice is not trusted a third time
        remote.read_members(1)


def test_labels_beside_a_remote_set_are_read(store, tmp_path):
    local = ShardSet.open(store.folder)
    columns = write_random_labels(local, "first")
    remote = open_set(store, tmp_path)
    for _ in range(2):  # those of another day under the same tag are fetched again
        for wanted, got in zip(columns, read_labels(remote, "first")[1], strict=True):
            np.testing.assert_array_equal(got, wanted)
        columns = write_random_labels(local, "first", seed=1)
    read_labels(remote, "first")
    (labels_folder(store.folder, "first") / "demo-000001.parquet").write_bytes(b"damage")
    shutil.rmtree(labels_folder(remote.folder, "first"))
    with pytest.raises(UsageError, match=r"demo-000001\.parquet"):
        read_labels(remote, "first")
    with pytest.raises(UsageError, match="no labels with the tag 'second'"):
        read_labels(remote, "second")


def test_the_mean_action_is_read_from_a_few_shards(store, made, tmp_path, monkeypatch):
    local = mean_actions(ShardSet.open(made), 0.0, seed=0)
    whole = mean_actions(open_set(store, tmp_path), 0.0, seed=0)
    np.testing.assert_array_equal(whole.mean, local.mean)
    monkeypatch.setattr(baseline, "MAX_REMOTE_SHARDS", 1)
    store.requests.clear()
    few = mean_actions(open_set(store, tmp_path / "other"), 0.0, seed=0)
    num_kinds = np.count_nonzero(local.weight)
    assert sum(name.endswith(".tar") for name in store.requests) <= num_kinds
    np.testing.assert_array_equal(few.weight, local.weight)
    assert (few.mean != local.mean).any()


def test_every_byte_of_a_remote_set_is_verified(store, tmp_path):
    cache = ShardCache.of(DataConfig(**settings(tmp_path)))
    assert verify_shards(store.url, cache=cache) == []
    (store.folder / "demo-000001.tar").unlink()
    ShardIndex.path_of(store.folder / "demo-000002.tar").unlink()
    other = ShardCache.of(DataConfig(**settings(tmp_path / "other")))
    first, second = verify_shards(store.url, cache=other)
    assert str(first) == "demo-000001.tar: cannot be fetched: demo-000001.tar: the server says 404 Not Found"
    assert second.shard == "demo-000002.tar" and "index.npz: missing" in second.what
    assert verify_shards(store.url, cache=cache) == []  # there they are whole


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_outage_ends_the_run_in_one_line(store, tmp_path, num_workers):
    config = tiny_config(data=settings(tmp_path, fetch_patience_seconds=0.01, num_workers=num_workers))
    dataset = dataset_of(ShardSet.open(store.url, config.data), config)
    store.answers = {path.name: 503 for path in store.folder.glob("*.tar")}
    with pytest.raises(RunFailed, match=r"\.tar could not be fetched, .* the server says 503") as caught:
        load(dataset, config)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_what_cannot_be_opened_is_one_line(store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_set, "START_PATIENCE_SECONDS", 0.01)
    for change, kind, message in (
        (lambda: store.answers.update({MANIFEST_NAME: 500}), RunFailed, r"manifest\.json could not be fetched"),
        (lambda: store.answers.update({MANIFEST_NAME: 404}), UsageError, r"manifest\.json: .* 404.*give the address"),
        (lambda: store.answers.clear(), None, None),
        (lambda: (store.folder / MANIFEST_NAME).write_text("{"), UsageError, r"/sets/mine/manifest\.json: not JSON"),
    ):
        change()
        if kind is None:
            open_set(store, tmp_path / "other")
            continue
        with pytest.raises(kind, match=message) as caught:
            open_set(store, tmp_path)
        assert "\n" not in str(caught.value) and store.url in str(caught.value)


@pytest.mark.parametrize("changes", [{"sha256": "../../outside"}, {"sha256": ""}, {"bytes": -1}, {"bytes": 0}])
def test_a_manifest_that_names_no_file_of_the_cache_is_refused(store, tmp_path, changes):
    manifest = Manifest.load(store.folder)
    first = manifest.shards[0].model_copy(update=changes)
    manifest.model_copy(update={"shards": (first, *manifest.shards[1:])}).save(store.folder)
    with pytest.raises(
        UsageError, match=r"sets/mine/manifest\.json: auto-000000\.tar has an impossible sha256 or size"
    ):
        open_set(store, tmp_path)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".lock"]


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "another shard's"])
def test_an_index_that_is_lost_or_damaged_is_one_line(store, tmp_path, damage):
    path = ShardIndex.path_of(store.folder / "demo-000002.tar")
    data = path.read_bytes()
    path.write_bytes(data[:-50] if damage == "cut" else data[:300] + bytes([data[300] ^ 4]) + data[301:])
    if damage == "missing":
        path.unlink()
    if damage == "another shard's":
        path.write_bytes(ShardIndex.path_of(store.folder / "auto-000000.tar").read_bytes())
    with pytest.raises(UsageError, match=r"demo-000002\.index\.npz: .*run 'recap-ds shards index' on a copy") as caught:
        open_set(store, tmp_path)
    assert "\n" not in str(caught.value)
    path.write_bytes(data)
    assert open_set(store, tmp_path).num_samples > 0  # nothing wrong was kept


def test_a_cache_that_cannot_be_used_is_one_line(store, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "sets").write_text("")
    with pytest.raises(UsageError, match=r"data\.cache_folder: .*cache cannot be used \(Not a directory\)"):
        open_set(store, tmp_path)


def test_a_cache_that_is_too_small_is_one_line(store, tmp_path):
    with pytest.raises(UsageError, match=r"data\.max_cache_gib: 9.99e-07 is less than the largest shard"):
        open_set(store, tmp_path, max_cache_gib=1e-6)
