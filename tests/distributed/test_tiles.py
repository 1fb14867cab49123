"""Tiles move a training state between layouts; saved on two ranks, resumed on two and on one."""

from typing import Any

import pytest

from tests.distributed.harness import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("tiles") / "saved")


@pytest.fixture(scope="module")
def saved(folder) -> list[dict[str, Any]]:
    return run_ranks("tile_worker", 2, "save", folder)


@pytest.fixture(scope="module")
def loaded(saved, folder) -> dict[str, Any]:
    return run_ranks("tile_worker", 1, "load", folder)[0]


def test_tiles_of_all_ranks_cover_every_trainable_parameter_once(saved):
    ends = dict.fromkeys(saved[0]["sizes"], 0)
    for rank in saved:
        assert [tile[0] for tile in rank["tiles"]] == list(ends), "the same names on every rank"
        for name, start, length, group in rank["tiles"]:
            assert start == ends[name]
            assert group == ("critic" if name.startswith("critic") else "policy")
            ends[name] = start + length
    assert ends == saved[0]["sizes"]
    assert not any(name.startswith(("trunk.frozen", "target_critic")) for name in ends)


def test_resuming_the_same_layout_is_bit_exact(saved):
    for rank in saved:
        assert rank["saved_step"] == 3
        assert rank["resumed"]["zero3"] == {
            "fresh_step": 0,
            "step": 4,
            "forward_copies_follow": True,
            "error": 0.0,
            "moments_moved": True,
        }


@pytest.mark.parametrize("config", ["zero2", "offload"])
def test_resuming_another_stage_on_two_ranks(saved, config):
    for rank in saved:
        assert rank["resumed"][config]["step"] == 4
        assert rank["resumed"][config]["error"] < 3e-7
        assert rank["resumed"][config]["moments_moved"]


@pytest.mark.parametrize("config", ["zero3", "zero3 other sub-groups", "zero2", "offload", "zero2 offload"])
def test_resuming_on_one_rank(loaded, config):
    resumed = loaded["resumed"][config]
    assert (resumed["fresh_step"], resumed["step"], resumed["forward_copies_follow"]) == (0, 4, True)
    assert resumed["error"] < 3e-7
    assert resumed["moments_moved"]


def test_moments_can_be_read_after_plain_training(loaded):
    assert loaded["moments_after_training"] == dict.fromkeys(loaded["resumed"], True)


def test_resuming_in_bf16_keeps_fp32_masters(loaded):
    resumed = loaded["resumed"]["zero3 bf16"]
    assert resumed["forward_copies_follow"]
    # The step itself is taken on bf16 weights; masters rounded to bf16 would be off by up to 1e-3 at once.
    assert 0 < resumed["error"] < 2e-4


def test_reductions_on_two_ranks(saved):
    for rank in saved:
        assert rank["reductions"] == {
            "sum": [1.0, 19.0],
            "max": [1.0, 10.0],
            "mine_unwritten": True,
            "gathered": [0.0, 10.0, 1.0, 9.0],
            "gathered_bools": [True, True, False, True],
            "agreed": 1,
            "object": {"step": 7, "names": ["a", "b"], "rank": 0},
        }


def test_reductions_of_one_process_return_their_input(loaded):
    reductions = loaded["reductions"]
    assert reductions["sum"] == reductions["max"] == reductions["gathered"] == [0.0, 10.0]
    assert reductions["gathered_bools"] == [True, True]
    assert reductions["object"] == {"step": 7, "names": ["a", "b"], "rank": 0}


def test_transformers_models_are_sharded_and_initialised_with_and_without_hpz(saved):
    for rank in saved:
        for build in (rank["build"], rank["build"]["hpz"]):
            assert build["sharded"]
            assert build["initialised"]
