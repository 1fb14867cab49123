from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from recap_ds.data.lerobot.hub import find_dataset
from recap_ds.errors import UsageError

HUB_ID = "lab/cubes"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "lerobot"))
    # Read from the environment when huggingface_hub is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cached_snapshot(cache, revision="main", commit="c" * 40):
    repo = cache / "hub/datasets--lab--cubes"
    (repo / "snapshots" / commit / "meta").mkdir(parents=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / revision).write_text(commit)
    return repo / "snapshots" / commit


def test_a_folder_is_itself(cache):
    (cache / "lab/cubes").mkdir(parents=True)
    assert find_dataset(HUB_ID) == (Path(HUB_ID), "cubes")
    assert find_dataset(str(cache / "gone")) == (cache / "gone", "gone")  # what is wrong with it is said later


def test_the_hub_cache_is_used_without_a_network(cache):
    snapshot = cached_snapshot(cache)
    tagged = cached_snapshot(cache, "v2.1", "d" * 40)
    assert find_dataset(HUB_ID) == (snapshot, "cubes")
    assert find_dataset(f"{HUB_ID}@v2.1") == (tagged, "cubes")


def test_the_cache_is_used_behind_a_broken_proxy(cache, monkeypatch):
    snapshot = cached_snapshot(cache)
    download = huggingface_hub.snapshot_download

    def through_the_proxy(*args, local_files_only, **more):
        if not local_files_only:
            raise RuntimeError("proxy says no")  # a transport library's own, which the client passes on
        return download(*args, local_files_only=True, **more)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", through_the_proxy)
    assert find_dataset(HUB_ID) == (snapshot, "cubes")
    with pytest.raises(UsageError, match=r"other/set: no such folder.*the hub does not give it \(proxy says no\)"):
        find_dataset("other/set")


def test_what_lerobot_recorded_here_comes_first(cache):
    cached_snapshot(cache)
    folder = cache / "lerobot" / HUB_ID
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text("{}")
    assert find_dataset(HUB_ID) == (folder, "cubes")


@pytest.mark.parametrize("source", [HUB_ID, f"{HUB_ID}@v2.1"])
def test_where_neither_has_it_one_line_says_what_to_do(source):
    with pytest.raises(
        UsageError, match=rf"{source}: no such folder, .* 'hf download --repo-type dataset lab/cubes'"
    ) as e:
        find_dataset(source)
    assert "\n" not in str(e.value)
