"""Run folders and shards on disks that are whole, full, read-only or damaged."""

import errno
import fcntl
import os
import shutil

import pytest

from recap_ds.config import DataConfig, ModelConfig
from recap_ds.doctor import reading, storage, weights
from recap_ds.envs.scripted import write_reach_shards
from recap_ds.files.records import write_checked_json
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import save_pretrained
from tests.data.shard_server import serve
from tests.tiny import tiny_config


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(storage, "BLOCK_BYTES", 2**16)
    monkeypatch.setattr(storage, "NUM_BLOCKS", 4)


def test_a_good_folder_is_tried_and_left_as_it_was(tmp_path, small, monkeypatch):
    monkeypatch.setattr(storage, "SLOW_BYTES_PER_SECOND", 0.0)
    monkeypatch.setattr(storage, "LOW_BYTES", 0)
    (tmp_path / "mine").write_text("kept")
    commit, speed = storage.storage_findings(tmp_path / "runs" / "not" / "yet")
    assert (commit.level, speed.level) == ("ok", "ok") and str(tmp_path) in speed.what
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_slow_and_almost_full_disks_are_warnings(tmp_path, small, monkeypatch):
    monkeypatch.setattr(storage, "write_speed", lambda *_: (50e6, 0.001))
    assert storage.storage_findings(tmp_path)[1].level == "warn"
    monkeypatch.setattr(storage, "write_speed", lambda *_: (1e9, 0.001))
    monkeypatch.setattr(storage, "LOW_BYTES", 2**60)
    assert "checkpoint.keep_last" in storage.storage_findings(tmp_path)[1].mend
    monkeypatch.setattr(storage, "MIN_BYTES", 2**60)
    assert storage.storage_findings(tmp_path)[1].level == "fail"


def test_a_file_in_the_way_and_a_full_disk_fail(tmp_path, small, monkeypatch):
    (tmp_path / "file").touch()
    (found,) = storage.storage_findings(tmp_path / "file" / "runs")
    assert found.level == "fail" and "is a file" in found.what

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "write_speed", full)
    (found,) = storage.storage_findings(tmp_path)
    assert found.level == "fail" and "No space left on device" in found.what


def test_a_disk_without_symlinks_or_locks_fails(tmp_path, small, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # a lock that holds nobody off
    symlink, lock, _ = storage.storage_findings(tmp_path)
    assert symlink.level == "fail" and "symlink does not work" in symlink.what
    assert lock.level == "fail" and "two processes could both lock" in lock.what


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "reach"
    write_reach_shards(folder, num_demo=4, num_auto=4, num_intervention=2)
    return folder


def test_shards_are_read_both_ways(shards, monkeypatch):
    monkeypatch.setattr(reading, "SLOW_SAMPLES_PER_SECOND", 0.0)
    (found,) = reading.reading_findings(shards, DataConfig())
    assert found.level == "ok" and "MB/s in sequence" in found.what and "samples/s at random" in found.what
    monkeypatch.setattr(reading, "SLOW_SAMPLES_PER_SECOND", 1e12)
    assert reading.reading_findings(shards, DataConfig())[0].level == "warn"


def test_shards_that_are_absent_cut_or_damaged_fail(shards, tmp_path):
    (absent,) = reading.reading_findings(tmp_path / "nowhere", DataConfig())
    assert absent.level == "fail" and "manifest.json: missing" in absent.what
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    tar = sorted(broken.glob("*.tar"))[0]
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    (cut,) = reading.reading_findings(broken, DataConfig())
    assert cut.level == "fail" and tar.name in cut.what and "the manifest says" in cut.what
    tar.write_bytes(bytes(len(whole)))
    (zeroed,) = reading.reading_findings(broken, DataConfig())
    assert zeroed.level == "fail" and "crc32" in zeroed.what and "shards verify" in zeroed.mend


def test_remote_shards_are_fetched_once(shards, tmp_path):
    with serve(shards) as server:
        data = DataConfig(cache_folder=str(tmp_path))
        first, second = (reading.reading_findings(server.url, data)[0] for _ in range(2))
        assert first.level == second.level == "ok" and "one fetched at" in first.what and "cached" in second.what
        largest = max(path.stat().st_size for path in shards.glob("*.tar")) / 2**30
        (small,) = reading.reading_findings(server.url, data.model_copy(update={"max_cache_gib": 1.1 * largest}))
        assert small.level == "warn" and "does not hold them all" in small.what
        server.answers["manifest.json"] = 403
        (refused,) = reading.reading_findings(server.url, data)
        assert refused.level == "fail" and "403" in refused.what


def test_an_export_to_start_from_brings_its_weights(tmp_path):
    write_checked_json(tmp_path / "export.json", {"format_version": 1})
    assert "is not an export's record" in weights.start_finding(tmp_path).what
    save_pretrained(PiStarRECAPPolicy(tiny_config()), None, tmp_path / "export")
    found = weights.start_finding(tmp_path / "export")
    assert found.level == "ok" and "the run starts from" in found.what
    (tmp_path / "export/action_expert.safetensors").unlink()
    broken = weights.start_finding(tmp_path / "export")
    assert broken.level == "fail" and "action_expert.safetensors is missing" in broken.what


def test_weights_are_looked_for_and_never_fetched(tmp_path, monkeypatch):
    assert weights.weights_finding(ModelConfig(vlm_model_name="tiny")).level == "ok"
    absent = weights.weights_finding(ModelConfig(vlm_model_name=str(tmp_path / "no")))
    assert absent.level == "fail" and "there is no folder" in absent.what
    (tmp_path / "empty").mkdir()
    empty = weights.weights_finding(ModelConfig(vlm_model_name=str(tmp_path / "empty")))
    assert empty.level == "fail" and "has no config.json" in empty.what
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    hub = weights.weights_finding(ModelConfig(vlm_model_name="nobody/no-such-model"))
    assert hub.level == "warn" and "hf auth login" in hub.mend
