"""Training from an import: what it reads, on whichever rank, and what it needs no hub for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from recap_ds.checkpoint.base import ensure_base
from recap_ds.checkpoint.start import check_start, fill_heads
from recap_ds.distributed import sharded_builder
from recap_ds.distributed.runtime import RankInfo
from recap_ds.distributed.sharded_builder import ShardedBuilder
from recap_ds.distributed.tiles import local_shard
from recap_ds.envs.scripted import write_reach_shards
from recap_ds.files.tensor_reader import FileTensor
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.recipe import load_config
from recap_ds.train.session import plan_session
from recap_ds.weights.importer import import_weights
from tests.distributed.harness import REPOSITORY
from tests.weights.made_published import config_of, published, random_modules


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """pi0.5 with a tokenizer of its own, in which every letter is <unk>."""
    folder = tmp_path_factory.mktemp("imported")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(special.values())}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "tokenizer_source")
    save_file(published(*random_modules("pi05")), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of("pi05")))
    import_weights(str(folder), folder / "export", [f"model.vlm_model_name={folder / 'tokenizer_source'}"])
    return folder / "export"


@pytest.fixture
def config(imported, tmp_path):
    """Of a recipe whose VLM is nowhere to be had."""
    write_reach_shards(tmp_path / "shards", num_demo=2, num_auto=0, num_intervention=0, size=16)
    settings = [
        "model.vlm_model_name=nobody/nothing",
        f"training.start_from={imported}",
        f"data.shards={tmp_path / 'shards'}",
        f"runs_dir={tmp_path / 'runs'}",
        "training.use_amp=false",
        "data.num_workers=0",
    ]
    return load_config(imported / "config.yaml", settings)


def test_a_run_begins_with_it_whole_or_sharded_and_asks_no_hub(config, imported, runtime):
    plan = plan_session(config, REPOSITORY / "ds_configs/zero3.json", RankInfo())
    assert plan.dataset.assembler._task_tokens[0].max() == 3  # the import's tokenizer
    check_start(plan.start, runtime)
    policy = PiStarRECAPPolicy(config, builder := ShardedBuilder(plan.ds_config, runtime.device), str(plan.start.vlm))
    fill_heads(plan.start, policy, builder, runtime)
    whole = PiStarRECAPPolicy.from_pretrained(imported)
    for name, parameter in policy.named_parameters():  # one rank's shard is all of a parameter
        assert torch.equal(local_shard(parameter), whole.get_parameter(name).detach().flatten()), name
    ensure_base(plan.run.path, policy, config, runtime, plan.start.vlm)
    assert (plan.run.path / "base/tokenizer.json").is_file()  # so that its exports have it too


def test_a_rank_reads_its_own_slice_alone(monkeypatch):
    asked, written = [], []

    def read(start, length):
        asked.append((start, length))
        return torch.arange(start, start + length)

    monkeypatch.setattr(sharded_builder, "param_is_sharded", lambda parameter: True)
    monkeypatch.setattr(sharded_builder, "local_span", lambda parameter: (20, 10))
    monkeypatch.setattr(sharded_builder, "write_local_shard", lambda parameter, values: written.append(values))
    ShardedBuilder({}, torch.device("cpu")).write_from_file(
        torch.nn.Parameter(torch.empty(0)), FileTensor((5, 6), read)
    )
    assert asked == [(20, 10)] and written[0].tolist() == list(range(20, 30))


def test_the_weights_in_the_export_are_what_transformers_reads(imported):
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(imported / "vlm", output_loading_info=True)
    assert not info["unexpected_keys"] and set(info["missing_keys"]) <= {"lm_head.weight"}
    stored = load_file(imported / "vlm/model.safetensors")["language_model.model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, stored)
