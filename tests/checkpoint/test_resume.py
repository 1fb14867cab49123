"""Exact resume at the same layout, and the same training at another: two ranks wrote, one reads."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from recap_ds.checkpoint import save as save_module
from recap_ds.checkpoint.base import base_folder, ensure_base
from recap_ds.checkpoint.resume import load_checkpoint, read_state
from recap_ds.checkpoint.save import remove_unfinished, save_checkpoint
from recap_ds.config import CheckpointConfig
from recap_ds.distributed.tiles import read_adam_step
from recap_ds.errors import RunFailed, UsageError
from recap_ds.models.vlm_weights import checkpoint_tensors
from recap_ds.recipe import load_config
from tests.checkpoint.hand_made import KINDS
from tests.checkpoint.tiny_run import start, train


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_and_two_more_are_four_bit_for_bit(two_ranks, kind):
    for result in (rank[kind] for rank in two_ranks[1]):
        assert result["resumed_losses"] == result["losses"]
        assert result["differing"] == [] and result["num_compared"] > 300
        assert result["adam_steps"] == [6, 4]  # the first engine went on to step 6
        assert result["state"] == {"step": 2, "next_slot": 8} and result["ring_is_equal"]
        assert result["found"] == "step_00000004"


@pytest.mark.parametrize("ds_name", ["zero3_offload", "zero2", "zero3_hpz"])
def test_bfloat16_comes_back_bit_for_bit_under_every_shipped_config(two_ranks, ds_name):
    for result in (rank[ds_name] for rank in two_ranks[1]):
        assert result["resumed_losses"] == result["losses"]
        assert result["differing"] == []


@pytest.mark.parametrize(("kind", "ds_name"), [("frozen", "zero3"), ("lora", "zero2"), ("full", "zero2")])
def test_one_rank_goes_on_where_two_stopped(two_ranks, runtime, kind, ds_name):
    folder = two_ranks[0] / kind
    config = load_config(folder / "config.yaml")
    run = start(config, runtime, ds_name, vlm_folder=base_folder(folder))
    ensure_base(folder, run.engine.module, config, runtime)
    path = folder / "checkpoints" / "step_00000004"
    state, _ = load_checkpoint(path, runtime=runtime, engine=run.engine, shadows=run.shadows)
    assert state["step"] == 4 and read_adam_step(run.engine) == 4
    losses = train(run, range(4, 6), runtime)
    assert losses == pytest.approx(json.loads((folder / "truth.json").read_text()), rel=3e-7)


def test_a_rank_that_fails_fails_all_and_changes_nothing(two_ranks):
    for result in (rank["failure"] for rank in two_ranks[1]):
        checkpoints = two_ranks[0] / "failure" / "checkpoints"
        path = checkpoints / ".step_00000006.unfinished" / "rank_00001.safetensors"
        native = checkpoints / ".step_00000006.unfinished/deepspeed/zero/zero_pp_rank_1_mp_rank_00_model_states.pt"
        for name, full in (("ours", path), ("deepspeed", native)):
            assert result["messages"][name].startswith(
                f"{checkpoints}: saving step 6 failed (rank 1: {full}: No space left on device); free space"
            )
        assert result["latest"] == "step_00000004"
        # keep_last=1, and the best; nothing hidden is left either
        assert result["after"] == ["best", "latest", "step_00000002", "step_00000008"]
    # Rank 0 has removed the unfinished folder by the time it raises.
    assert two_ranks[1][0]["failure"]["before"] == ["best", "latest", "step_00000002", "step_00000004"]


def test_threads_write_what_was_there_and_all_ranks_commit_together(two_ranks):
    first, second = (rank["background"] for rank in two_ranks[1])
    assert first["begun"] and second["begun"] and first["losses"] == second["losses"]
    # Not before the slow rank was done, and at the same boundary.
    assert first["until_committed"] == second["until_committed"] >= 3
    folder = two_ranks[0] / "background" / "checkpoints"
    for rank in (0, 1):
        name = f"rank_{rank:05d}.safetensors"
        before, thread, now = (folder / f"step_{step:08d}" / name for step in (2, 3, 6))
        assert thread.read_bytes() == before.read_bytes() != now.read_bytes()
    assert read_state(folder / "step_00000003") == {"step": 3}
    for result in (first, second):
        assert result["failed"] == ["step_00000002", "step_00000003"]
        (line,) = result["said"]
        assert line.startswith("warning: saving step 5 failed (rank 1: ") and line.endswith(
            "No space left on device); training goes on, step_00000003 is whole and the next save tries again "
            "(1 of checkpoint.max_failed_saves=3)"
        )
        assert result["after"] == ["best", "latest", *(f"step_{step:08d}" for step in (2, 3, 6, 7))]


def test_a_random_frozen_vlm_is_written_once_and_read_from_then_on(two_ranks, runtime):
    folder = two_ranks[0] / "lora"
    truth = {
        name.removeprefix("raw/vlm.paligemma.").replace(".base_layer", ""): value
        for name, value in load_file(folder / "truth.safetensors").items()
        if name.startswith("raw/vlm.") and ".lora_" not in name
    }
    stored = dict(checkpoint_tensors(folder / "base"))
    assert stored.keys() == truth.keys()
    assert all(torch.equal(stored[name].whole(), value) for name, value in truth.items())
    assert base_folder(two_ranks[0] / "full") is None


def test_a_changed_base_is_refused(two_ranks, runtime, tmp_path):
    run = shutil.copytree(two_ranks[0] / "frozen", tmp_path / "run")
    weights = run / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(UsageError, match="was changed or damaged"):
        ensure_base(run, None, load_config(run / "config.yaml"), runtime)


def save(run, checkpoints, step, runtime, best=False, **keep):
    return save_checkpoint(
        checkpoints, step, runtime=runtime, engine=run.engine, shadows=run.shadows,
        state={}, tensors={}, keep=CheckpointConfig(**keep), best=best,
    )  # fmt: skip


def test_retention_keeps_the_last_the_multiples_and_the_best(one_rank, runtime, tmp_path):
    keep = {"keep_last": 2, "keep_every_steps": 40}
    (tmp_path / "step_00000999").mkdir()  # of a run that was wound back: not ours to remove
    for step in (10, 20, 30, 40, 50, 60, 70):
        save(one_rank, tmp_path, step, runtime, best=step in (20, 30), **keep)
    names = ["best", "latest", *(f"step_{step:08d}" for step in (30, 40, 60, 70, 999))]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "best").readlink().name == "step_00000030"
    assert (tmp_path / "latest").readlink().name == "step_00000070"


def test_the_same_step_is_replaced(one_rank, runtime, tmp_path):
    first = save(one_rank, tmp_path, 3, runtime)
    (first / "stray").touch()
    assert not (save(one_rank, tmp_path, 3, runtime) / "stray").exists()


@pytest.mark.parametrize(("kind", "said"), [("full", "vlm.paligemma"), ("lora", "lora_A")])
def test_a_checkpoint_of_another_model_is_refused(two_ranks, one_rank, runtime, kind, said):
    path = two_ranks[0] / kind / "checkpoints" / "step_00000004"
    with pytest.raises(UsageError, match=f"holds parameter '.*{said}.*', which this model does not train"):
        load_checkpoint(path, runtime=runtime, engine=one_rank.engine, shadows=one_rank.shadows)


def test_averages_must_match(two_ranks, one_rank, runtime):
    path = two_ranks[0] / "frozen" / "checkpoints" / "step_00000004"
    target = {"target": one_rank.shadows["target"]}
    with pytest.raises(UsageError, match="the checkpoint keeps 'ema' averages and the run does not"):
        load_checkpoint(path, runtime=runtime, engine=one_rank.engine, shadows=target)


@pytest.mark.parametrize("writes", ["write_tile_file", "write_tensor_file", "sync_folder"])
def test_a_full_disk_is_named_and_not_filled_further(one_rank, runtime, tmp_path, monkeypatch, writes):
    whole = getattr(save_module, writes)

    def full_disk(path, *arguments):
        whole(path, *arguments)
        raise OSError(errno.ENOSPC, "No space left on device")  # a write's own error names no file

    monkeypatch.setattr(save_module, writes, full_disk)
    with pytest.raises(RunFailed) as caught:
        save(one_rank, tmp_path, 1, runtime)
    assert str(caught.value) == (
        f"{tmp_path}: saving step 1 failed (No space left on device); free space there or make the folder writable, "
        "then start the run again: it goes on from its newest checkpoint"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(one_rank, runtime, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFailed, match=r"^.*/file/checkpoints: saving step 1 failed \(.*Not a directory\); free"):
        save(one_rank, tmp_path / "file" / "checkpoints", 1, runtime)


def test_what_killed_runs_left_is_removed_and_the_rest_stays(tmp_path):
    for name in (".step_00000001.unfinished/deepspeed", ".step_00000002.removed", "step_00000003"):
        (tmp_path / name).mkdir(parents=True)
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
    remove_unfinished(tmp_path / "never_started")


def test_a_folder_that_ranks_do_not_share_is_said_so(one_rank, runtime, tmp_path, monkeypatch):
    whole = save_module.write_tile_file

    def elsewhere(path, tiles):
        record = whole(path, tiles)
        path.unlink()  # as if this rank had a disk of its own
        return record

    monkeypatch.setattr(save_module, "write_tile_file", elsewhere)
    with pytest.raises(UsageError, match="file system that all nodes share"):
        save(one_rank, tmp_path, 1, runtime)
    assert list(tmp_path.iterdir()) == []


def test_a_sharded_policy_does_not_save_itself(one_rank, tmp_path):
    with pytest.raises(UsageError, match="sharded inside an engine"):
        one_rank.engine.module.save_checkpoint(tmp_path / "policy.safetensors")
    assert list(tmp_path.iterdir()) == []
