"""The frozen VLM of a run: written if it was drawn at random, remembered by its checksums if it came from files."""

import errno
import shutil

import pytest

from recap_ds.checkpoint.base import base_folder, ensure_base
from recap_ds.checkpoint.base_record import BaseRecord, frozen_weights
from recap_ds.errors import RunFailed, UsageError
from recap_ds.files.tensors import TensorFileWriter
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import save_pretrained
from tests.checkpoint.hand_made import make_config
from tests.tiny import tiny_config


@pytest.fixture
def source(tmp_path):
    """A PaliGemma folder with a file that looks like a tokenizer's."""
    save_pretrained(PiStarRECAPPolicy(make_config("frozen")), None, tmp_path / "donor")
    (tmp_path / "donor/vlm").rename(tmp_path / "paligemma")
    (tmp_path / "paligemma/tokenizer.json").write_text("{}")
    return tmp_path / "paligemma"


def change(path):
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def test_a_random_vlm_is_written_and_read_back(runtime, tmp_path):
    config = make_config("lora")
    run = tmp_path / "run"
    assert base_folder(run) is None
    first = PiStarRECAPPolicy(config)
    ensure_base(run, first, config, runtime)
    assert sorted(path.name for path in (run / "base").iterdir()) == ["config.json", "model.safetensors"]
    assert base_folder(run) == str(run / "base") == str(frozen_weights(run, config.vlm_source))
    again = PiStarRECAPPolicy(config, vlm_folder=base_folder(run))
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(bool((one == other).all()) for one, other in pairs)
    written = (run / "base/model.safetensors").stat().st_mtime_ns
    ensure_base(run, again, config, runtime)
    assert (run / "base/model.safetensors").stat().st_mtime_ns == written


def test_a_vlm_from_files_is_remembered_and_may_move(runtime, tmp_path, source):
    config = tiny_config(model={"vlm_model_name": str(source)})
    run = tmp_path / "run"
    policy = PiStarRECAPPolicy(config)
    ensure_base(run, policy, config, runtime)
    assert sorted(path.name for path in (run / "base").iterdir()) == ["config.json", "tokenizer.json"]
    assert base_folder(run) is None and frozen_weights(run, config.vlm_source) == source
    assert BaseRecord.load(run).files.keys() == {"model.safetensors"}

    moved = source.rename(tmp_path / "moved")
    elsewhere = tiny_config(model={"vlm_model_name": str(moved)})
    ensure_base(run, policy, elsewhere, runtime)
    assert frozen_weights(run, elsewhere.vlm_source) == moved
    change(moved / "model.safetensors")
    with pytest.raises(UsageError, match="was started from other weights"):
        ensure_base(run, policy, elsewhere, runtime)


def test_a_vlm_from_another_source_than_the_settings_is_the_base(runtime, tmp_path, source):
    config = make_config("lora")
    run = tmp_path / "run"
    policy = PiStarRECAPPolicy(config, vlm_folder=str(source))
    ensure_base(run, policy, config, runtime, source)
    assert base_folder(run) is None and frozen_weights(run, config.vlm_source) == source
    ensure_base(run, policy, config, runtime, source)
    change(source / "model.safetensors")
    with pytest.raises(UsageError, match="was started from other weights"):
        ensure_base(run, policy, config, runtime, source)


def test_a_trained_vlm_has_no_base_but_an_architecture(runtime, tmp_path):
    config = make_config("full")
    ensure_base(tmp_path, PiStarRECAPPolicy(config), config, runtime)
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["config.json"]
    assert base_folder(tmp_path) is None and frozen_weights(tmp_path, config.vlm_source) is None


def test_a_start_that_was_cut_off_leaves_nothing_to_trust(runtime, tmp_path):
    config = make_config("frozen")
    policy = PiStarRECAPPolicy(config)
    ensure_base(tmp_path, policy, config, runtime)
    (tmp_path / "base.json").unlink()
    change(tmp_path / "base/model.safetensors")
    shutil.copytree(tmp_path / "base", tmp_path / ".base.unfinished")
    assert base_folder(tmp_path) is None
    ensure_base(tmp_path, policy, config, runtime)
    assert frozen_weights(tmp_path, config.vlm_source) == tmp_path / "base"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "base.json"]


@pytest.mark.parametrize("where", ["weights", "record"])
def test_a_full_disk_leaves_a_run_that_can_start_again(runtime, tmp_path, monkeypatch, where):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    config = make_config("frozen")
    policy = PiStarRECAPPolicy(config)
    with monkeypatch.context() as patch:
        patch.setattr(*((TensorFileWriter, "write") if where == "weights" else (BaseRecord, "save")), full_disk)
        with pytest.raises(RunFailed, match=r"base: the VLM .* could not be written \(No space left on device\); free"):
            ensure_base(tmp_path, policy, config, runtime)
    assert base_folder(tmp_path) is None and not (tmp_path / ".base.unfinished").exists()
    ensure_base(tmp_path, policy, config, runtime)
    assert frozen_weights(tmp_path, config.model) == tmp_path / "base"
