"""What two ranks trained, in one process: bit for bit what DeepSpeed gathers, and what plain libraries load."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.consolidate import consolidate, merged_recipe
from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.models.losses import local_counts, normalizers
from recap_ds.models.pixels import to_pixels
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import load_pretrained
from tests.checkpoint.hand_made import CONTRACT, KINDS, assert_same, expected_targets, make_config, make_run
from tests.made_export import HEADS_OF_STAGES
from tests.tiny import random_batch, tiny_config, wake


def parameters(policy):
    return {name: param.detach() for name, param in policy.named_parameters()}


def features(policy, seed=1):
    observation = random_batch(policy.config, 4, seed=seed).observation
    with torch.no_grad():
        return policy.vlm(observation, to_pixels(observation.images))


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_what_deepspeed_gathers(two_ranks, tmp_path, kind, weights):
    folder = two_ranks[0] / kind
    record = consolidate(folder, tmp_path / "export", weights=weights)
    assert (record.provenance.step, record.provenance.weights) == (4, weights)
    policy, contract, _ = load_pretrained(tmp_path / "export")
    assert contract == CONTRACT and policy.contract == CONTRACT
    truth = load_file(folder / "truth.safetensors")
    prefix = f"{weights}/"
    assert_same(parameters(policy), {k.removeprefix(prefix): v for k, v in truth.items() if k.startswith(prefix)})

    batch = random_batch(policy.config, 4, seed=9, num_tasks=1)
    actions = policy(batch, "evaluate", None, normalizers(local_counts(batch)), False).actions
    torch.testing.assert_close(actions, truth[f"actions/{weights}"], rtol=0, atol=1e-6)


def test_transformers_loads_the_vlm_and_peft_the_adapter(two_ranks, tmp_path):
    from peft import PeftModel
    from transformers import PaliGemmaForConditionalGeneration

    consolidate(two_ranks[0] / "lora", tmp_path / "export")
    policy = load_pretrained(tmp_path / "export").policy
    adapted = features(policy)
    plain, report = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "export/vlm", output_loading_info=True)
    assert not any(report.values()), report
    # The language head is tied to the token embedding, and not in the files.
    assert plain.lm_head.weight is plain.model.language_model.embed_tokens.weight
    peft_model = PeftModel.from_pretrained(plain, tmp_path / "export/adapter").eval()
    policy.vlm.paligemma = peft_model.base_model.model.model
    torch.testing.assert_close(features(policy).hidden, adapted.hidden, rtol=0, atol=1e-5)
    with peft_model.disable_adapter():
        assert (features(policy).hidden - adapted.hidden).abs().max() > 1e-4  # the adapter does something


def test_settings_of_a_merged_policy_hold_together():
    learning = tiny_config(
        model={"action_expert": "pi_joint", "action_token_weight": 1.0, "stop_gradient": True},
        lora={"enabled": True},
        data={"normalization": "quantile"},
        training={"stage": "policy"},
        recap={"sft": True},
    )
    merged = PiStarRECAPConfig(**merged_recipe(learning).model_dump())
    assert not merged.lora.enabled and not merged.learns_action_tokens and merged.model.stop_gradient


def test_merged_weights_see_what_the_adapter_sees(two_ranks, tmp_path):
    consolidate(two_ranks[0] / "lora", tmp_path / "separate")
    record = consolidate(two_ranks[0] / "lora", tmp_path / "merged", merge=True)
    assert record.adapter == "merged" and not (tmp_path / "merged/adapter").exists()
    separate, merged = (load_pretrained(tmp_path / name).policy for name in ("separate", "merged"))
    assert not merged.config.lora.enabled
    torch.testing.assert_close(features(merged).hidden, features(separate).hidden, rtol=0, atol=1e-5)
    assert_same(parameters(merged.action_expert), parameters(separate.action_expert))


# -- runs made by hand: no engine, tiles cut in three ------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "tiny_lora"
    policy = PiStarRECAPPolicy(make_config("lora"))
    wake(policy)
    make_run(run, policy, steps=(5, 9))
    return run, policy


def test_masters_average_and_target_are_kept_apart(lora_run, tmp_path):
    run, policy = lora_run
    consolidate(run, tmp_path / "raw", weights="raw")
    consolidate(run / "best", tmp_path / "ema")
    raw, ema = (load_pretrained(tmp_path / name).policy for name in ("raw", "ema"))
    assert_same(parameters(raw.critic), parameters(policy.critic))
    assert_same(parameters(ema.critic), {name: value + 1 for name, value in parameters(policy.critic).items()})
    for loaded in (raw, ema):
        assert_same(parameters(loaded.target_critic), expected_targets(policy))
    assert_same(parameters(raw.vlm), parameters(policy.vlm))


def test_bfloat16_is_the_nearest_value(lora_run, tmp_path):
    run, policy = lora_run
    consolidate(run, tmp_path / "export", weights="raw", dtype="bfloat16")
    stored = load_file(tmp_path / "export/action_expert.safetensors")
    assert_same(stored, {name: value.bfloat16() for name, value in parameters(policy.action_expert).items()})
    assert {tensor.dtype for tensor in load_file(tmp_path / "export/vlm/model.safetensors").values()} == {
        torch.bfloat16
    }


def test_the_vlm_is_split_into_shards_that_fit(lora_run, tmp_path):
    from transformers import PaliGemmaForConditionalGeneration

    run, policy = lora_run
    limit = 600_000
    record = consolidate(run, tmp_path / "export", weights="raw", max_shard_bytes=limit)
    shards = {name: file for name, file in record.files.items() if name.startswith("vlm/model-")}
    assert len(shards) > 3 and max(file.bytes for file in shards.values()) < limit + 10_000  # and a header
    assert "vlm/model.safetensors.index.json" in record.files
    assert_same(parameters(load_pretrained(tmp_path / "export").policy.vlm), parameters(policy.vlm))
    PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "export/vlm")


def test_an_adapter_alone(lora_run, tmp_path):
    record = consolidate(lora_run[0], tmp_path / "export", adapter_only=True)
    assert sorted(name.split("/")[0] for name in record.files) == ["adapter", "adapter", "config.yaml", "contract.json"]
    with pytest.raises(UsageError, match="holds an adapter alone"):
        load_pretrained(tmp_path / "export")


def test_without_critics_it_acts_and_has_none(lora_run, tmp_path):
    consolidate(lora_run[0], tmp_path / "export", policy_only=True)
    policy = load_pretrained(tmp_path / "export").policy
    assert sorted(name for name, _ in policy.named_children()) == ["action_expert", "vlm"]
    observation = random_batch(policy.config, 2, seed=0).observation
    assert torch.isfinite(policy.predict_action_chunk(observation)).all()


@pytest.mark.parametrize(("stage", "heads"), HEADS_OF_STAGES.values(), ids=HEADS_OF_STAGES)
def test_every_stage_exports_the_heads_it_trained(tmp_path, stage, heads):
    trained = PiStarRECAPPolicy(tiny_config(model={"freeze_vlm": False}, **stage))
    make_run(tmp_path / "run", trained)
    assert consolidate(tmp_path / "run", tmp_path / "export", weights="raw").heads == heads
    loaded = load_pretrained(tmp_path / "export").policy
    expected = parameters(trained)
    if "target_critic" in heads:
        expected |= {f"target_critic.{name}": value for name, value in expected_targets(trained).items()}
    assert_same(parameters(loaded), expected)
    if "critic" in heads:
        with pytest.raises(UsageError, match="--policy-only: a run of stage critic holds no policy"):
            consolidate(tmp_path / "run", tmp_path / "none", policy_only=True)
        assert not (tmp_path / "none").exists()


def test_an_export_replaces_an_export_and_nothing_else(lora_run, tmp_path):
    run, out = lora_run[0], tmp_path / "export"
    out.mkdir()
    (out / "thesis.txt").touch()
    with pytest.raises(UsageError, match="is there already and is no export"):
        consolidate(run, out, overwrite=True)
    (out / "thesis.txt").unlink()
    consolidate(run, out)
    with pytest.raises(UsageError, match="--overwrite"):
        consolidate(run, out)
    assert consolidate(run / "step_00000005", out, overwrite=True).provenance.step == 5
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"merge": True}, "trained without adapters"),
        ({"adapter_only": True}, "trained without adapters"),
        ({"merge": True, "adapter_only": True}, "contradict each other"),
    ],
)
def test_options_that_do_not_fit_the_run_are_refused(tmp_path, options, said):
    make_run(tmp_path / "run", PiStarRECAPPolicy(make_config("frozen")))
    with pytest.raises(UsageError, match=said):
        consolidate(tmp_path / "run", tmp_path / "export", **options)
    assert not (tmp_path / "export").exists()


def test_damage_is_found_before_anything_is_written(lora_run, tmp_path):
    run = shutil.copytree(lora_run[0], tmp_path / "run", symlinks=True)
    rank_file = run / "checkpoints/step_00000009" / layout.rank_file_name(2)
    rank_file.write_bytes(rank_file.read_bytes()[:-8])
    with pytest.raises(UsageError, match=r"step_00000009: rank_00002.safetensors has .* choose another step"):
        consolidate(run, tmp_path / "export")
    base = run / "base/model.safetensors"
    base.write_bytes(base.read_bytes()[:-1] + b"\1")
    with pytest.raises(UsageError, match="was started from other weights"):
        consolidate(run / "best", tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# -- the model card ----------------------------------------------------------------------------------------------------


def test_the_card_says_where_the_weights_come_from_and_how_good_the_run_was(lora_run, tmp_path):
    run = shutil.copytree(lora_run[0], tmp_path / "run", symlinks=True)
    record = consolidate(run, tmp_path / "early")
    card = (tmp_path / "early/README.md").read_text()
    assert card.startswith("---\nlibrary_name: recap_ds\n") and "base_model" not in card  # drawn at random
    for line in (
        "# tiny_lora",
        "| run | tiny_lora |",
        "| step | 9 |",
        "| weights | average over training (EMA) |",
        "| checkpoint | recap_ds files, 3 ranks |",
        f"| checkpoint sha256 | {record.provenance.checkpoint_sha256} |",
        f"| config sha256 | {record.config_sha256} |",
        f"| data manifest | {CONTRACT.manifest_hash} |",
        "| cameras | front, wrist |",
        "- reach the cube",
    ):
        assert line in card.splitlines(), line
    assert "## Results" not in card  # the run has not finished

    (run / "summary.json").write_text(json.dumps({"step": 9, "evaluation": {"eval/loss": 0.123456, "eval/nll": None}}))
    consolidate(run, tmp_path / "done")
    consolidate(run / "step_00000005", tmp_path / "older", merge=True, policy_only=True)
    done, older = ((tmp_path / name / "README.md").read_text() for name in ("done", "older"))
    assert "in training, of this checkpoint.\n" in done and "| eval/loss | 0.1235 |\n| eval/nll | - |" in done
    assert "of the run's last step, 9: not of this checkpoint" in older and "Adapter: merged" in older
    assert "PeftModel" in done and "PeftModel" not in older and "critic" not in older.split("## Use")[0]

    (run / "summary.json").write_text("half")
    with pytest.raises(UsageError, match=r"summary\.json: cannot be read"):
        consolidate(run, tmp_path / "never")


def test_the_card_may_be_edited(lora_run, tmp_path):
    run, policy = lora_run
    consolidate(run, tmp_path / "export")
    (tmp_path / "export/README.md").write_text("mine")
    assert load_pretrained(tmp_path / "export").policy.config == policy.config


def test_a_model_on_the_hub_is_named_as_the_base(tmp_path):
    policy = PiStarRECAPPolicy(make_config("full"))
    model = policy.config.model.model_copy(update={"vlm_model_name": "google/paligemma-3b-pt-224"})
    policy.config = policy.config.model_copy(update={"model": model})
    make_run(tmp_path / "run", policy)
    consolidate(tmp_path / "run", tmp_path / "export")
    card = (tmp_path / "export/README.md").read_text()
    assert 'base_model: "google/paligemma-3b-pt-224"' in card.split("---")[1]
