"""PaliGemma folders: every spelling of its keys loads strictly; what does not fit is one clear line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaForConditionalGeneration

from recap_ds.errors import UsageError
from recap_ds.models.building import Builder
from recap_ds.models.vlm import VisionLanguageModel, tiny_config
from recap_ds.models.vlm_weights import weight_files
from tests.tiny import tiny_config as policy_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as transformers writes it, and the tensors by their names inside PaliGemmaModel."""
    torch.manual_seed(5)
    model = PaliGemmaForConditionalGeneration(tiny_config(32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("paligemma")
    model.save_pretrained(folder)
    return folder, {name: value.clone() for name, value in model.model.named_parameters()}


def write(folder, saved, tensors, **config):
    values = json.loads((saved[0] / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")


def build(folder, **model):
    config = policy_config(model={"vlm_model_name": str(folder), **model})
    return VisionLanguageModel(config.model, config.lora, Builder(), seed=0)


def check_loaded(vlm, tensors):
    parameters = dict(vlm.paligemma.named_parameters())
    assert parameters.keys() == tensors.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(parameters[name], value, msg=name, check_dtype=False)


def hub_spelling(name):
    """google/paligemma-3b-pt-224, as uploaded in 2024."""
    return name.replace("language_model.", "language_model.model.", 1).replace(
        "vision_tower.", "vision_tower.vision_model.", 1
    )


def middle_spelling(name):
    """transformers 4.52 and later."""
    return "model." + name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def test_a_folder_saved_by_transformers_loads(saved):
    vlm = build(saved[0])
    assert not vlm.random_init
    check_loaded(vlm, saved[1])


@pytest.mark.parametrize("spelling", [hub_spelling, middle_spelling, str])
def test_every_spelling_of_the_keys_loads(saved, tmp_path, spelling):
    tensors = {spelling(name): value for name, value in saved[1].items()}
    head = "language_model.lm_head.weight" if spelling is hub_spelling else "lm_head.weight"
    tensors |= {head: torch.zeros(4, 4), spelling("vision_tower.head.probe"): torch.zeros(4)}
    write(tmp_path, saved, tensors)
    check_loaded(build(tmp_path), saved[1])


def test_a_split_checkpoint_loads_by_its_index(saved, tmp_path):
    names = sorted(saved[1])
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    write(tmp_path, saved, {"stray": torch.zeros(1)})
    for file, part in parts.items():
        save_file({name: saved[1][name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check_loaded(build(tmp_path), saved[1])
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UsageError, match=r"lacks b.safetensors"):
        build(tmp_path)


def test_stray_files_beside_the_model_are_left_alone(saved, tmp_path):
    write(tmp_path, saved, saved[1])
    save_file({"other": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_bfloat16_files_and_dtypes_in_the_config_give_the_builders_dtype(saved, tmp_path):
    tensors = {name: value.bfloat16() for name, value in saved[1].items()}
    towers = json.loads((saved[0] / "config.json").read_text())
    mixed = {part: towers[part] | {"dtype": "bfloat16"} for part in ("text_config", "vision_config")}
    write(tmp_path, saved, tensors, dtype="float32", **mixed)
    vlm = build(tmp_path)
    assert {parameter.dtype for parameter in vlm.parameters()} == {torch.float32}
    check_loaded(vlm, {name: value.float() for name, value in tensors.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("language_model.norm.weight"), "no tensor for 1 parameters.*language_model.norm.weight"),
        (lambda t: t.update(surplus=torch.zeros(1)), "tensor 'surplus' has no place in the model"),
        (
            lambda t: t.update({"language_model.norm.weight": torch.zeros(5)}),
            r"'language_model.norm.weight' has shape \(5,\), the model needs \(128,\)",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_that_do_not_fit_are_named(saved, tmp_path, change, message):
    tensors = dict(saved[1])
    change(tensors)
    write(tmp_path, saved, tensors)
    with pytest.raises(UsageError, match=f"model.vlm_model_name: .*{message}"):
        build(tmp_path)


def test_folders_that_are_no_model(saved, tmp_path):
    with pytest.raises(UsageError, match=r"there is no folder .*absent"):
        build(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"has no config\.json"):
        build(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        build(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma"}))
    with pytest.raises(UsageError, match="holds a gemma, not a paligemma"):
        build(tmp_path)
    (tmp_path / "config.json").write_text((saved[0] / "config.json").read_text())
    with pytest.raises(UsageError, match=r"lacks any .safetensors file") as caught:
        build(tmp_path)
    assert str(caught.value).count("model.vlm_model_name") == 1


def test_a_truncated_file_is_a_clear_error(saved, tmp_path):
    write(tmp_path, saved, saved[1])
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"model.vlm_model_name: .*model.safetensors: cannot be read .*copy it again"):
        build(tmp_path)


def test_another_image_size_is_refused(saved):
    with pytest.raises(UsageError, match=r"model.image_size: 64, but .* sees 32 px"):
        build(saved[0], image_size=64)


def test_a_home_folder_may_be_named_with_a_tilde(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved[0].parent))
    check_loaded(build(f"~/{saved[0].name}"), saved[1])


def test_the_architecture_of_a_folder_with_random_weights(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved[0] / "config.json").read_text())
    vlm = build(tmp_path, vlm_random_init=True)
    assert vlm.random_init
    assert {name: p.shape for name, p in vlm.paligemma.named_parameters()} == {n: t.shape for n, t in saved[1].items()}


def test_the_file_transformers_wrote_is_what_was_read(saved):
    """The fixture proves something only if its names are not already ours."""
    assert load_file(saved[0] / "model.safetensors").keys() != saved[1].keys()
