"""Whole trainings under ZeRO-3: what must not depend on ranks, accumulation, evaluation or an interruption."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recap_ds.config import SOURCES
from recap_ds.data.tar import file_sha256
from recap_ds.envs.scripted import write_reach_shards
from tests.data.shard_server import ShardServer, serve
from tests.distributed.harness import run_ranks
from tests.models.tiny_architectures import build, save

WORKER = "train.train_worker"
KINDS = ("full", "lora", "frozen")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("training")
    write_reach_shards(root / "shards", num_demo=6, num_auto=6, num_intervention=4, size=32)
    save(build("llava"), root / "llava")
    return str(root)


@pytest.fixture(scope="module")
def server(folder) -> Iterator[ShardServer]:
    """Of the same shards: every tenth connection breaks, and the first answer with a shard of each source."""
    with serve(Path(folder) / "shards") as server:
        server.drop_every = 10
        server.truncate = {f"{source}-000000.tar" for source in SOURCES}
        (Path(folder) / "address").write_text(server.url)
        yield server


@pytest.fixture(scope="module")
def two_ranks(folder, server) -> list[dict[str, Any]]:
    return run_ranks(WORKER, 2, folder, "everything", timeout_seconds=600)


@pytest.fixture(scope="module")
def one_rank(folder, two_ranks) -> dict[str, Any]:
    return run_ranks(WORKER, 1, folder, "layout")[0]


def check_close(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    """Loss traces and weight fingerprints of two runs."""
    assert len(a["losses"]) == len(b["losses"]) > 0
    for mine, other in zip(a["losses"], b["losses"], strict=True):
        # The last two are the gradient norm and the advantages of one rank's last micro-batch only.
        assert mine[:4] == pytest.approx(other[:4], rel=tolerance, abs=tolerance)
    assert a["weights"].keys() == b["weights"].keys()
    for name, moments in a["weights"].items():
        assert moments == pytest.approx(b["weights"][name], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values_are_plain_pytorchs(two_ranks, kind):
    assert two_ranks[0][f"initial_{kind}"] == []


def test_one_and_two_ranks_train_the_same_weights(two_ranks, one_rank):
    check_close(two_ranks[0]["full"], one_rank["full"], 2e-5)


def test_accumulation_trains_the_same_weights(two_ranks):
    check_close(two_ranks[0]["full"], two_ranks[0]["no_accumulation"], 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_finite_and_ranks_agree(two_ranks, kind):
    first, second = (rank[kind] for rank in two_ranks)
    assert first["weights"] == second["weights"]
    assert all(math.isfinite(number) for step in first["losses"] for number in step)
    assert first["summary"]["skipped_steps"] == 0
    assert "eval/loss" in first["summary"]["evaluation"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_with_the_same_bytes(two_ranks, kind):
    resumed = two_ranks[0][f"resumed_{kind}"]
    assert len(resumed["before"]) >= 2  # a file per rank at least
    assert resumed["after"] == resumed["before"]
    assert resumed["losses_after"] == resumed["losses_before"]


def test_evaluation_between_steps_leaves_the_training_bit_identical(two_ranks):
    assert two_ranks[0]["evaluated_bytes"] == two_ranks[0]["blind_bytes"]
    assert two_ranks[0]["full"]["losses"] == two_ranks[0]["no_evaluation"]["losses"]


def test_shards_from_an_unreliable_server_train_the_same_run(two_ranks, folder, server):
    for rank in two_ranks:
        remote, local = rank["remote"], rank["full"]
        assert (remote["losses"], remote["weights"]) == (local["losses"], local["weights"])
        assert remote["summary"]["evaluation"] == local["summary"]["evaluation"]
    assert server.num_dropped > 0 and not server.truncate
    shards = json.loads((Path(folder) / "shards" / "manifest.json").read_text())["shards"]
    found = {path.stem: file_sha256(path) for path in (Path(folder) / "cache" / "shards").glob("*.[tp]ar*")}
    assert found == {shard["sha256"]: shard["sha256"] for shard in shards}


def test_a_run_that_was_asked_to_stop_ends_with_the_same_bytes(two_ranks):
    for rank in two_ranks:
        stopped = rank["stopped"]
        assert stopped["said"].startswith("stopped at step 4 of 6 (the stop file): "), "one rank was asked, both obey"
        assert "step_00000004" in stopped["between"]
        assert stopped["after"] == two_ranks[0]["resumed_full"]["before"]


def test_a_guard_that_sees_no_spike_changes_no_bit(two_ranks):
    guarded, free = two_ranks[0]["guarded"], two_ranks[0]["resumed_full"]["before"]
    ranks = {name: digest for name, digest in guarded["bytes"].items() if name.startswith("rank_")}
    assert len(ranks) == 2 and ranks == {name: free[name] for name in ranks}
    assert guarded["losses"] == two_ranks[0]["full"]["losses"]
    assert (guarded["summary"]["spikes"], guarded["summary"]["rollbacks"]) == (0, 0)


def test_spikes_are_skipped_and_then_the_run_goes_back_and_around_their_samples(two_ranks):
    spiky, batch = two_ranks[0]["spiky"], 8
    steps = [*range(6), 3, 4, 5]
    assert spiky["taken"] == [[step, slot * batch] for slot, step in enumerate(steps)]
    assert two_ranks[1]["spiky"]["taken"] == spiky["taken"]
    assert (spiky["summary"]["spikes"], spiky["summary"]["rollbacks"], spiky["summary"]["step"]) == (2, 1, 6)
    assert sorted((line["step"], line["rank"]) for line in spiky["spikes"]) == [(5, 0), (5, 1), (6, 0), (6, 1)]
    assert min(line["first_slot"] for line in spiky["spikes"]) == 4 * batch
    assert max(line["last_slot"] for line in spiky["spikes"]) == 6 * batch - 1
    # What came before is as it was; the metrics hold every step once.
    assert spiky["losses"][:3] == two_ranks[0]["full"]["losses"][:3] and len(spiky["losses"]) == 6
    assert spiky["losses"][3] != two_ranks[0]["full"]["losses"][3], "other samples from there on"


def test_an_export_evaluates_the_same_on_any_number_of_ranks(two_ranks, one_rank):
    first, second, alone = two_ranks[0]["evaluation"], two_ranks[1]["evaluation"], one_rank["evaluation"]
    assert first == second
    assert first["num_samples"] == alone["num_samples"] > 0
    for name in ("total_loss", "policy_loss", "q_loss", "v_loss"):
        assert first[name] == pytest.approx(alone[name], rel=1e-5), name
    # The averaged weights of the run were evaluated while it trained, too.
    assert first["policy_loss"] == pytest.approx(
        two_ranks[0]["full"]["summary"]["evaluation"]["eval/policy_loss"], rel=1e-4
    )
    for group, figures in first["actions"].items():
        assert figures["error"] == pytest.approx(alone["actions"][group]["error"], rel=1e-4), group
        assert figures["indicator_effect"] > 0, "the indicator must reach the action"


def test_only_what_should_train_moves(two_ranks):
    result = two_ranks[0]
    # The three kinds begin from the same weights; a frozen VLM ends with them, a trained one does not.
    frozen, full = result["frozen"]["weights"], result["full"]["weights"]
    vlm = [name for name in frozen if name.startswith("vlm.")]
    assert vlm and all(frozen[name] != full[name] for name in vlm if "bias" not in name and "k_proj" not in name)
    lora = result["lora"]["weights"]
    bases = {name.replace(".base_layer", ""): moments for name, moments in lora.items() if "lora_" not in name}
    assert all(bases[name] == frozen[name] for name in vlm)
    ups = [moments for name, moments in lora.items() if ".lora_B." in name]
    assert ups and all(square > 0 for _, square, _ in ups), "an adapter that starts at zero must have moved"


def test_bf16_with_activation_checkpointing_trains(two_ranks):
    losses = two_ranks[0]["bf16"]["losses"]
    assert all(math.isfinite(number) for step in losses for number in step)
    # bf16 rounds, but it is the same training: parts stay within a few percent of fp32's.
    for mine, exact in zip(losses, two_ranks[0]["full"]["losses"], strict=True):
        assert mine[:2] == pytest.approx(exact[:2], rel=0.05)


# -- critic, then labels, then policy ---------------------------------------------------------------------------

STAGES = ("critic", "policy")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_begins_as_in_plain_pytorch_and_its_ranks_agree(two_ranks, stage):
    assert two_ranks[0][f"initial_{stage}"] == []
    first, second = (rank[stage] for rank in two_ranks)
    assert first["weights"] == second["weights"]
    assert all(math.isfinite(number) for step in first["losses"] for number in step)
    assert first["summary"]["skipped_steps"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_stage_ends_with_the_same_bytes(two_ranks, stage):
    resumed = two_ranks[0][f"resumed_{stage}"]
    assert len(resumed["before"]) >= 2 and resumed["after"] == resumed["before"]
    assert resumed["losses_after"] == resumed["losses_before"]


def test_a_critic_trains_the_vlm_and_is_judged_by_its_gate(two_ranks):
    result, initial = two_ranks[0]["critic"], two_ranks[0]["frozen"]["weights"]
    names = {name.split(".")[0] for name in result["weights"]}
    assert names == {"vlm", "critic"}
    vlm = [name for name in initial if name.startswith("vlm.") and "bias" not in name and "k_proj" not in name]
    assert vlm and all(result["weights"][name] != initial[name] for name in vlm)
    # A broad distribution over 201 bins that knows nothing: about log 201.
    assert result["losses"][0][0] == pytest.approx(math.log(201), abs=1.0)
    gate, evaluation = result["summary"]["gate"], result["summary"]["evaluation"]
    assert gate["gate"] == "mae" and gate["best"] <= evaluation["eval/value_mae"]
    exported = two_ranks[0]["evaluation_critic"]["value"]["all"]
    assert exported["mae"] == pytest.approx(evaluation["eval/value_mae"], rel=1e-4)
    assert exported["nll"] == pytest.approx(evaluation["eval/value_nll"], rel=1e-4)


def test_a_policy_learns_from_the_labels_that_the_critic_wrote(two_ranks):
    result = two_ranks[0]["policy"]
    assert {name.split(".")[0] for name in result["weights"]} == {"vlm", "action_expert"}
    exported = two_ranks[0]["evaluation_policy"]
    assert exported["policy_loss"] == pytest.approx(result["summary"]["evaluation"]["eval/policy_loss"], rel=1e-4)
    assert exported["value"] is None and exported["actions"]
    # Weighted by exp(A / (temperature * sigma)): the loss is no longer the mean error.
    assert any(step[0] != pytest.approx(step[1], rel=0.05) for step in result["losses"])


# -- critics alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["iql", "own"])
def test_a_critic_alone_trains_the_same_on_one_and_two_ranks(two_ranks, one_rank, which):
    first, second = (rank["critics"][which] for rank in two_ranks)
    assert first["weights"] == second["weights"] and first["summary"]["skipped_steps"] == 0
    # The pool's key bias has no gradient but rounding, which Adam makes steps of: more of it through a deeper VLM.
    check_close(first, one_rank[which], {"iql": 2e-5, "own": 1e-4}[which])
    heads = {"iql": {"critic", "target_critic"}, "own": {"critic"}}[which]
    assert {name.split(".")[0] for name in first["weights"]} == {"vlm", *heads}


def test_a_bf16_critic_trains_as_the_float32_one(two_ranks):
    rounded, exact = two_ranks[0]["bf16_critic"], two_ranks[0]["critic"]
    assert rounded["summary"]["skipped_steps"] == 0 and rounded["weights"] == two_ranks[1]["bf16_critic"]["weights"]
    for mine, other in zip(rounded["losses"], exact["losses"], strict=True):
        assert mine[:2] == pytest.approx(other[:2], rel=0.05)


@pytest.mark.parametrize("which", ["own", "own_lora"])
def test_a_vlm_of_another_architecture_begins_sharded_as_in_plain_pytorch_and_is_exported(two_ranks, which):
    critics = two_ranks[0]["critics"]
    assert critics[f"initial_{which}"] == []
    evaluation = critics[which]["summary"]["evaluation"]
    exported = critics[f"evaluation_{which}"]["value"]["all"]
    assert exported["mae"] == pytest.approx(evaluation["eval/value_mae"], rel=1e-4)
    assert exported["nll"] == pytest.approx(evaluation["eval/value_nll"], rel=1e-4)


def test_what_a_critics_own_vlm_learns_and_what_it_leaves(two_ranks):
    own, adapted = (two_ranks[0]["critics"][which]["weights"] for which in ("own", "own_lora"))
    bases = {name.replace(".base_layer", ""): moments for name, moments in adapted.items() if "lora_" not in name}
    matrices = [name for name in own if name.startswith("vlm.") and "bias" not in name and "k_proj" not in name]
    left = ("vision_tower.post_layernorm.", "vision_tower.encoder.layers.1.")
    for name in matrices:
        assert (own[name] == bases[name]) == any(part in name for part in left), name


def test_an_interrupted_critic_with_its_own_vlm_ends_with_the_same_bytes(two_ranks):
    resumed = two_ranks[0]["critics"]["resumed_own"]
    assert len(resumed["before"]) >= 2 and resumed["after"] == resumed["before"]
    assert resumed["losses_after"] == resumed["losses_before"]
