"""Facts about DeepSpeed that this package leans on or works around.

Where one fails after an upgrade, audit the code that its message names; do not just update the number.
"""

from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks("canary_worker", 2)


def test_zero3_reapplies_the_last_gradient_of_an_unused_parameter(ranks):
    stale = ranks[0]["stale"]
    assert stale["norm"] > 1.01 * stale["norm_of_b"], "fixed upstream: engine.zero_stale_gradients may go"
    assert not stale["nan_step_applied"]
    assert not stale["step_after_nan_applied"], "fixed upstream: engine.zero_stale_gradients may go"


@pytest.mark.parametrize("config", ["zero3", "offload", "zero2"])
def test_zero_stale_gradients_cures_it(ranks, config):
    for rank in ranks:
        cured = rank["cured"][config]
        assert cured["norm"] == pytest.approx(cured["norm_of_b"], rel=1e-6)
        assert not cured["nan_step_applied"]
        assert cured["step_after_nan_applied"]


def test_of_two_backwards_only_the_last_counts(ranks):
    norms = ranks[0]["two_forwards"]
    assert norms["norm"] == norms["norm_of_second"], "fixed upstream: one forward per backward is no longer a must"


def test_a_small_frozen_parameter_hides_a_plain_write_to_its_shard(ranks):
    for rank in ranks:
        assert not rank["persistent_write"]["plain_write_seen"], (
            "fixed upstream: tiles.write_local_shard may be simpler"
        )
        assert rank["persistent_write"]["our_write_seen"]


def test_polyak_in_bf16_stands_still():
    target = {dtype: torch.tensor(0.9, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    for _ in range(2000):
        for value in target.values():
            value.lerp_(torch.tensor(1.0, dtype=value.dtype), 0.005)
    assert target[torch.bfloat16].item() < 0.91
    assert target[torch.float32].item() == pytest.approx(1.0 - 0.1 * 0.995**2000, abs=1e-4)


def test_buffers_built_in_a_sharded_build_are_cast_down(ranks):
    assert ranks[0]["buffer"] == {"dtype": "torch.bfloat16", "last": 1000.0, "sharded": True}


@pytest.mark.parametrize("config", ["zero3", "zero3 bf16", "zero2", "zero2 bf16"])
def test_nan_on_one_rank_skips_the_step_on_all(ranks, config):
    for rank in ranks:
        assert rank["nan"][config] == {"applied": False, "unchanged": True, "next_applied": True}


def test_gradients_of_one_container_forward_are_those_of_plain_autograd(ranks):
    for rank in ranks:
        assert len(rank["gradients"]) == 14
        for name, errors in rank["gradients"].items():
            assert errors["largest_difference"] < 5e-7, name
            assert errors["group_norm_error"] < 1e-6, name
            assert errors["global_norm_error"] < 1e-6, name
            assert errors["masters_match_safe_api"], name


def test_named_tuples_pass_zero3_hooks_and_dataclasses_do_not(ranks):
    assert ranks[0]["warnings_of_named_tuples"] == []
    assert ranks[0]["warnings_of_dataclass"], "the check above would not see the warning"


def test_deepspeed_accepts_a_misspelt_top_level_key(ranks):
    assert ranks[0]["misspelt_key_accepted"], "fixed upstream: ds_config.SUPPORTED_KEYS may go"


def test_the_hooks_of_every_module_ask_for_a_signature_at_every_call_and_find_it_at_once(ranks):
    for rank in ranks:
        assert rank["hooks"]["asks_for_signatures"], "fixed upstream: half of linear.lighten_hooks may go"
        assert rank["hooks"]["signatures_known"] and rank["hooks"]["linear_is_ours"]
