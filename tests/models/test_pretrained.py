"""Exports of plain policies: what is saved comes back bit for bit, and what is not whole is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from recap_ds.errors import UsageError
from recap_ds.files.records import record_file
from recap_ds.models.export_format import EXPORT_NAME, ExportRecord
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import load_pretrained, save_pretrained
from recap_ds.processing.tokens import ByteTokenizer
from tests.made_export import CONTRACT, HEADS_OF_STAGES
from tests.tiny import random_batch, tiny_config, wake

KINDS = {
    "frozen": {},
    "lora": {"lora": {"enabled": True, "rank": 2}},
    "full, conv stem": {"model": {"freeze_vlm": False, "conv_stem": True}},
}


def make_policy(**overrides):
    policy = PiStarRECAPPolicy(tiny_config(**overrides)).eval()
    wake(policy)
    return policy


def same_parameters(first, second):
    pairs = zip(first.named_parameters(), second.named_parameters(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
def test_what_is_saved_comes_back(tmp_path, overrides):
    policy = make_policy(**overrides)
    record = save_pretrained(policy, CONTRACT, tmp_path / "export")
    assert record == ExportRecord.load(tmp_path / "export")
    loaded, contract, tokenizer = load_pretrained(tmp_path / "export")
    assert same_parameters(policy, loaded) and not loaded.training
    assert loaded.config == policy.config and contract == CONTRACT and isinstance(tokenizer, ByteTokenizer)
    observation, noise = random_batch(policy.config, 3, seed=0).observation, torch.randn(3, 4, 6)
    actions = [which.predict_action_chunk(observation, noise=noise) for which in (policy, loaded)]
    assert torch.equal(*actions)


@pytest.mark.parametrize(("stage", "heads"), HEADS_OF_STAGES.values(), ids=HEADS_OF_STAGES)
def test_every_stage_comes_back_with_the_heads_it_has(tmp_path, stage, heads):
    policy = make_policy(**stage)
    record = save_pretrained(policy, CONTRACT, tmp_path / "export")
    assert record.heads == heads
    loaded = load_pretrained(tmp_path / "export").policy
    assert loaded.config == policy.config and same_parameters(policy, loaded)
    with pytest.raises(UsageError, match="holds no"):
        other = "critic" if "action_expert" in heads else "policy"
        load_pretrained(
            tmp_path / "export", [f"training.stage={other}", f"recap.sft={other == 'policy'}", "data.labels="]
        )


def test_only_a_vlm_without_the_conv_stem_is_for_transformers(tmp_path):
    for stem in (False, True):
        record = save_pretrained(make_policy(model={"conv_stem": stem}), None, tmp_path / str(stem))
        assert record.vlm_is_plain_transformers is not stem


def test_the_methods_of_the_policy_do_the_same(tmp_path):
    policy = make_policy()
    policy.contract = CONTRACT
    policy.save_pretrained(tmp_path / "export")
    loaded = PiStarRECAPPolicy.from_pretrained(tmp_path / "export")
    assert same_parameters(policy, loaded) and loaded.contract == CONTRACT


def test_a_policy_that_never_saw_data_has_no_contract(tmp_path):
    save_pretrained(make_policy(), None, tmp_path / "export")
    assert load_pretrained(tmp_path / "export").contract is None


def test_overrides_change_settings(tmp_path):
    save_pretrained(make_policy(), CONTRACT, tmp_path / "export")
    policy = load_pretrained(tmp_path / "export", overrides=["evaluation.max_samples=7"]).policy
    assert policy.config.evaluation.max_samples == 7


def test_an_override_that_changes_shapes_is_refused(tmp_path):
    save_pretrained(make_policy(), CONTRACT, tmp_path / "export")
    with pytest.raises(UsageError, match=r"action_expert.safetensors: does not fit the model"):
        load_pretrained(tmp_path / "export", overrides=["model.action_expert_num_layers=1"])


def test_a_tokenizer_travels_with_the_export(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "reach", "\n"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    source = tmp_path / "source"
    save_pretrained(make_policy(), None, tmp_path / "donor")
    shutil.copytree(tmp_path / "donor/vlm", source)
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(source)

    policy = make_policy(model={"vlm_model_name": str(source)})
    save_pretrained(policy, CONTRACT, tmp_path / "first")
    shutil.rmtree(source)  # an export stands on its own
    loaded, _, tokenizer = load_pretrained(tmp_path / "first")
    assert tokenizer.encode("reach") == [2, 4, 5]
    save_pretrained(loaded, CONTRACT, tmp_path / "second")
    assert load_pretrained(tmp_path / "second").tokenizer.encode("reach") == [2, 4, 5]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    export = tmp_path_factory.mktemp("exports") / "export"
    save_pretrained(make_policy(lora={"enabled": True, "rank": 2}), CONTRACT, export)
    return export


@pytest.fixture
def export(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "export")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "file", ["action_expert.safetensors", "vlm/model.safetensors", "adapter/adapter_model.safetensors", "config.yaml"]
)
def test_damage_is_named(export, file):
    path = export / file
    flip_a_bit(path)
    with pytest.raises(UsageError, match=f"{file} was changed or damaged"):
        load_pretrained(export)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UsageError, match=f"{file} has .* bytes instead of"):
        load_pretrained(export)
    path.unlink()
    with pytest.raises(UsageError, match=f"{file} is missing"):
        load_pretrained(export)


def rewrite(export, file, change):
    """Change the tensors of ``file`` and record it as if it had been written so."""
    tensors = load_file(export / file)
    change(tensors)
    save_file(tensors, export / file)
    record = ExportRecord.load(export)
    files = {**record.files, file: record_file(export / file)}
    record.model_copy(update={"files": files}).save(export)


@pytest.mark.parametrize("file", ["critic.safetensors", "vlm/model.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(min(tensors)),
        lambda tensors: tensors.update(extra=torch.zeros(1)),
        lambda tensors: tensors.update({min(tensors): torch.zeros(3, 1)}),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_every_tensor_must_have_its_place(export, file, change):
    rewrite(export, file, change)
    with pytest.raises(UsageError):
        load_pretrained(export)


def test_a_folder_that_is_no_export_is_said_so(tmp_path, export):
    with pytest.raises(UsageError, match=r"nowhere/export.json: cannot be read"):
        load_pretrained(tmp_path / "nowhere")
    record = export / EXPORT_NAME
    record.write_text(json.dumps({**json.loads(record.read_text()), "format_version": 2}))
    with pytest.raises(UsageError, match="has format 2"):
        load_pretrained(export)


def test_a_hub_id_is_downloaded_and_a_failure_is_one_line(export, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, revision: asked.append((name, revision)) or str(export)
    )
    assert load_pretrained("someone/policy").contract == CONTRACT
    assert PiStarRECAPPolicy.from_pretrained("someone/policy", revision="v2").contract == CONTRACT
    assert asked == [("someone/policy", None), ("someone/policy", "v2")]
    with pytest.raises(UsageError, match="is a folder, which has no revision 'v2'"):
        load_pretrained(export, revision="v2")

    def offline(name, revision):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UsageError, match=r"someone/policy: is no folder and not to be had from the hub \(no route\)"):
        load_pretrained("someone/policy")


# -- one file ---------------------------------------------------------------------------------------------------------


def test_a_plain_checkpoint_goes_there_and_back(tmp_path):
    policy = make_policy(lora={"enabled": True, "rank": 2})
    path = tmp_path / "new folder" / "policy.safetensors"
    policy.save_checkpoint(path, metadata={"step": 3, "tags": ["a"]})
    fresh = PiStarRECAPPolicy(policy.config)
    assert fresh.load_checkpoint(path) == {"step": 3, "tags": ["a"]}
    assert same_parameters(policy, fresh)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_plain_checkpoint_of_another_model_is_refused(tmp_path):
    make_policy().save_checkpoint(tmp_path / "policy.safetensors")
    other = PiStarRECAPPolicy(tiny_config(model={"num_q_networks": 3}))
    with pytest.raises(UsageError, match="no tensor for"):
        other.load_checkpoint(tmp_path / "policy.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UsageError, match="was not written by save_checkpoint"):
        other.load_checkpoint(tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "policy.safetensors").read_bytes()[:-9])
    with pytest.raises(UsageError, match="cannot be read"):
        other.load_checkpoint(tmp_path / "cut.safetensors")
