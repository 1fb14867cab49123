"""Beginning with another run's weights: what is taken, what begins anew, and what does not fit."""

import pytest
import torch

from recap_ds.checkpoint.on_demand import export_of
from recap_ds.checkpoint.start import check_start, fill_heads, find_start
from recap_ds.config import PiStarRECAPConfig
from recap_ds.distributed.ds_config import load_ds_config
from recap_ds.distributed.runtime import RankInfo
from recap_ds.distributed.sharded_builder import ShardedBuilder
from recap_ds.distributed.tiles import local_shard
from recap_ds.errors import UsageError
from recap_ds.models.building import Builder
from recap_ds.models.export_weights import load_export
from recap_ds.models.policy import PiStarRECAPPolicy
from tests.checkpoint.hand_made import KINDS, make_config, make_run
from tests.distributed.harness import REPOSITORY
from tests.tiny import tiny_config, wake

STAGES = {
    "joint": {},
    "critic": {"training": {"stage": "critic"}},
    "policy": {"training": {"stage": "policy"}, "recap": {"sft": True}},
}


def donor(tmp_path, kind="full"):
    """A run of stage joint whose weights no seed gives."""
    policy = PiStarRECAPPolicy(make_config(kind))
    wake(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    make_run(tmp_path / "donor", policy)
    return tmp_path / "donor"


def config_of(stage, start_from, kind="full", **model):
    values = {**STAGES[stage], **KINDS[kind]}
    training = {**values.get("training", {}), "start_from": str(start_from), "seed": 9}
    return tiny_config(**{**values, "training": training, "model": {**values.get("model", {}), **model}})


def begin(config: PiStarRECAPConfig, runtime, builder: Builder) -> dict[str, torch.Tensor]:
    """Parameters of a policy that begins as ``config`` says, flattened."""
    start = find_start(config, RankInfo())
    check_start(start, runtime)
    policy = PiStarRECAPPolicy(config, builder, vlm_folder=str(start.vlm))
    fill_heads(start, policy, builder, runtime)
    # One rank's shard is all of a parameter.
    return {name: local_shard(parameter).clone() for name, parameter in policy.named_parameters()}


def exported(run):
    policy = PiStarRECAPPolicy.from_pretrained(export_of(run, RankInfo()))
    return {name: parameter.detach().flatten() for name, parameter in policy.named_parameters()}


def zero3_builder(runtime):
    ds_config = load_ds_config(REPOSITORY / "ds_configs/zero3.json")
    sizes = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": 1, "gradient_accumulation_steps": 1}
    return ShardedBuilder({**ds_config, **sizes, "bf16": {"enabled": False}}, runtime.device)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("sharded", [False, True])
def test_every_stage_takes_the_vlm_and_the_heads_it_builds(stage, sharded, runtime, tmp_path):
    run = donor(tmp_path)
    builder = zero3_builder(runtime) if sharded else Builder()
    begun, given = begin(config_of(stage, run), runtime, builder), exported(run)
    heads = {name.split(".")[0] for name in begun}
    assert heads == {"vlm", *config_of(stage, run).heads}
    for name, value in begun.items():
        if not name.startswith("target_critic."):
            assert torch.equal(value, given[name]), name


def test_a_head_that_the_other_run_lacks_begins_at_random(runtime, tmp_path):
    policy = PiStarRECAPPolicy(tiny_config(**KINDS["full"], **STAGES["policy"]))
    policy.save_pretrained(tmp_path / "export")
    config = config_of("joint", tmp_path / "export")
    begun, fresh = begin(config, runtime, Builder()), PiStarRECAPPolicy(config)
    for name, parameter in fresh.named_parameters():
        if name.startswith("critic."):
            assert torch.equal(begun[name], parameter.detach().flatten()), name
        elif name.startswith("action_expert."):
            assert torch.equal(begun[name], policy.get_parameter(name).detach().flatten()), name


def test_an_adapter_goes_on_as_an_adapter(runtime, tmp_path):
    run = donor(tmp_path, "lora")
    begun, given = begin(config_of("policy", run, "lora"), runtime, Builder()), exported(run)
    adapter = [name for name in begun if "lora_" in name]
    assert adapter and all(torch.equal(begun[name], given[name]) for name in begun)
    with pytest.raises(UsageError, match=r"training\.start_from: .* has an adapter; set lora\.enabled=true"):
        find_start(config_of("policy", run, "full"), RankInfo())


PI_JOINT = {"action_expert": "pi_joint", "action_expert_num_heads": 4}
TOLD_IN_WORDS = {**PI_JOINT, "advantage_conditioning": "text"}


def test_published_weights_serve_either_way_of_telling_the_advantage(runtime, tmp_path):
    """What was trained on one goes on with that alone."""
    for name, model in (("vectors", PI_JOINT), ("words", TOLD_IN_WORDS)):
        policy = PiStarRECAPPolicy(tiny_config(model=model, **STAGES["policy"]))
        policy.save_pretrained(tmp_path / name)  # with an indicator of zeros, as an import has it
    begun = begin(config_of("policy", tmp_path / "vectors", **TOLD_IN_WORDS), runtime, Builder())
    loaded = load_export(PiStarRECAPPolicy, tmp_path / "vectors")
    given = {name: parameter.detach().flatten() for name, parameter in loaded.named_parameters()}
    assert given.keys() - begun.keys() == {"action_expert.indicator_in.weight"}
    assert all(torch.equal(value, given[name]) for name, value in begun.items())
    with pytest.raises(UsageError, match=r"training\.start_from: .*words has learned .* as text; set model\.adv"):
        find_start(config_of("policy", tmp_path / "words", **PI_JOINT), RankInfo())
    with torch.no_grad():
        trained = PiStarRECAPPolicy(tiny_config(model=PI_JOINT, **STAGES["policy"]))
        trained.action_expert.indicator_in.weight.add_(0.1)
        trained.save_pretrained(tmp_path / "trained")
    with pytest.raises(UsageError, match=r"as embedding; set model\.advantage_conditioning=embedding"):
        find_start(config_of("policy", tmp_path / "trained", **TOLD_IN_WORDS), RankInfo())


def test_what_does_not_fit_ends_in_one_line(runtime, tmp_path):
    run = donor(tmp_path)
    assert find_start(make_config("full"), RankInfo()) is None
    with pytest.raises(UsageError, match=r"training\.start_from: CHECKPOINT .*none: there is no such folder"):
        find_start(config_of("policy", tmp_path / "none"), RankInfo())
    with pytest.raises(UsageError, match=r"training\.start_from: .*action_expert\.safetensors: does not fit"):
        begin(config_of("policy", run, action_expert_hidden_size=64), runtime, Builder())
    start = find_start(config_of("policy", run), RankInfo())
    weights = start.export / "action_expert.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(UsageError, match=r"training\.start_from: .*action_expert\.safetensors was changed or damaged"):
        check_start(start, runtime)
