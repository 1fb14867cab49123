"""A critic's own VLM: equal to transformers' own forward, whatever the architecture; strict; and fit for ZeRO-3."""

import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText

from recap_ds.errors import UsageError
from recap_ds.models.backbones import check_vlm
from recap_ds.models.building import Builder
from recap_ds.models.inference_value import predict_values
from recap_ds.models.own_backbone import OwnBackbone
from recap_ds.models.pixels import to_pixels
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import load_pretrained
from recap_ds.processing.tokens import OwnTokenizer
from tests.models.tiny_architectures import CONFIGS, IMAGE_MEAN, IMAGE_STD, IMAGE_TOKEN, OTHERS, build, save
from tests.models.tiny_policy import gradients, train
from tests.tiny import random_batch, random_observation, tiny_config, wake

LORA = {"enabled": True, "rank": 4}
FULL = {"model": {"freeze_vlm": False}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (folder, the model that was saved there)."""
    root = tmp_path_factory.mktemp("architectures")
    built = {name: build(name) for name in CONFIGS}
    return {name: (save(model, root / name), model) for name, model in built.items()}


def own_config(folder, critic="distributional", **overrides):
    value = {"backbone": "own", "vlm_model_name": str(folder), "critic": critic, **overrides.pop("value", {})}
    training = {"stage": "critic", **overrides.pop("training", {})}
    return tiny_config(value=value, training=training, **overrides)


def backbone(folder, **overrides):
    return OwnBackbone(own_config(folder, **overrides), Builder())


def observe(batch_size=3, num_cameras=1, seed=0):
    return random_observation(tiny_config(), batch_size, torch.Generator().manual_seed(seed), num_cameras)


def encode(vlm, observation):
    return vlm(observation, to_pixels(observation.images))


@torch.no_grad()
def reference(model, observation, mask):
    """The architecture's own forward on [image tokens, prompt]; all cameras are there and come first."""
    ids = torch.full((len(mask), mask.shape[1]), IMAGE_TOKEN)
    ids[:, -observation.tokens.shape[1] :] = observation.tokens
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (IMAGE_MEAN, IMAGE_STD))
    pixels = (observation.images.flatten(0, 1).float() / 255.0 - mean) / std
    kinds = {"paligemma": torch.zeros_like(ids), "gemma3": (ids == IMAGE_TOKEN).long()}
    extra = {"token_type_ids": kinds[model.config.model_type]} if model.config.model_type in kinds else {}
    return model.model(input_ids=ids, pixel_values=pixels, attention_mask=mask.long(), **extra).last_hidden_state


@pytest.mark.parametrize("num_cameras", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_prefix_equals_the_architectures_own_forward(models, name, num_cameras):
    folder, model = models[name]
    observation = observe(num_cameras=num_cameras)
    observation = observation._replace(camera_mask=torch.ones_like(observation.camera_mask))
    vlm = backbone(folder)
    features = encode(vlm, observation)
    assert not vlm.random_init and vlm.width == features.hidden.shape[-1] == 32
    expected = reference(model, observation, features.mask)
    torch.testing.assert_close(features.hidden[features.mask], expected[features.mask], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_masked_camera_equals_a_robot_without_it(models, name):
    vlm, observation = backbone(models[name][0]), observe(num_cameras=2)
    mask = torch.tensor([False, True]).expand(3, -1)
    alone = encode(vlm, observation._replace(images=observation.images[:, 1:], camera_mask=mask[:, 1:]))
    features = encode(vlm, observation._replace(camera_mask=mask))
    assert features.hidden.isfinite().all(), "masked queries that see nothing would be NaN"
    torch.testing.assert_close(features.hidden[features.mask], alone.hidden[alone.mask], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_training_reaches_every_parameter_that_is_left_trainable(models, name):
    vlm, observation = backbone(models[name][0], **FULL), observe()
    features = encode(vlm, observation)
    features.hidden[features.mask].square().sum().backward()
    trainable = {n: p for n, p in vlm.named_parameters() if p.requires_grad}
    assert [n for n, p in trainable.items() if p.grad is None] == []
    frozen = {n.removeprefix("network.vision_tower.") for n, p in vlm.named_parameters() if not p.requires_grad}
    last = {"paligemma": "head.", "gemma3": "head.", "llava": ("encoder.layers.1.", "post_layernorm."), "internvl": ""}
    assert all(part.startswith(last[name]) for part in frozen) and bool(frozen) == bool(last[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_random_weights_are_the_seeds_and_none_is_dead(models, name):
    random = {"freeze_vlm": False, "vlm_random_init": True}
    first, again = (backbone(models[name][0], model=random) for _ in range(2))
    other = backbone(models[name][0], model=random, training={"seed": 5})
    assert first.random_init
    for (parameter_name, value), same in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(value, same) and value.isfinite().all(), parameter_name
    matrices = [n for n, p in first.named_parameters() if p.dim() > 1 and p.requires_grad]
    others = dict(other.named_parameters())
    assert matrices and not any(torch.equal(first.get_parameter(n), others[n]) for n in matrices)
    observation = observe()
    features = encode(first, observation)
    features.hidden[features.mask].square().sum().backward()
    assert [n for n in matrices if not first.get_parameter(n).grad.any()] == []


def test_adapters_sit_on_the_language_model_alone(models):
    vlm = backbone(models["llava"][0], lora=LORA)
    trainable = {name for name, parameter in vlm.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 2 * 7
    assert all(name.startswith("network.language_model.layers.") and "lora_" in name for name in trainable)
    base, observation = backbone(models["llava"][0]), observe()
    torch.testing.assert_close(encode(vlm, observation).hidden.detach(), encode(base, observation).hidden)


def test_frozen_keeps_nothing_for_backward(models):
    vlm, kept = backbone(models["gemma3"][0]), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        features = encode(vlm, observe())
    assert kept == [] and not features.hidden.requires_grad and not vlm.trainable


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_activation_checkpointing_gives_equal_gradients(models, name):
    grads = []
    for checkpointing in (False, True):
        vlm = backbone(models[name][0], **FULL).train()
        if checkpointing:
            vlm.enable_activation_checkpointing()
        features = encode(vlm, observe())
        features.hidden[features.mask].square().sum().backward()
        grads.append([p.grad for p in vlm.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_stay_float32_when_the_weights_are_cast(models, name):
    folder, model = models[name]
    vlm = backbone(folder)
    exact = {n: buffer.clone() for n, buffer in vlm.network.named_buffers()}
    assert exact and all(torch.equal(buffer, model.model.get_buffer(n)) for n, buffer in exact.items())
    vlm.bfloat16()
    assert all(torch.equal(buffer, exact[n]) for n, buffer in vlm.network.named_buffers())
    observation = observe()
    features, expected = encode(vlm, observation), encode(backbone(folder), observation)
    assert features.hidden.dtype == torch.bfloat16
    error = (features.hidden.float() - expected.hidden)[expected.mask].square().mean().sqrt()
    assert error < 0.05 * expected.hidden[expected.mask].square().mean().sqrt()


# -- in a policy --------------------------------------------------------------------------------------------------


def test_a_critic_trains_its_own_vlm(models):
    policy = PiStarRECAPPolicy(own_config(models["gemma3"][0], **FULL))
    batch = random_batch(policy.config, 8, seed=0)
    reached = {name.split(".")[0] for name, g in gradients(policy, train(policy, batch).loss).items() if g.any()}
    assert reached == {"vlm", "critic"}
    assert [group["name"] for group in policy.parameter_groups()] == ["vlm", "critic"]


def test_an_iql_critic_reads_both_observations_through_it(models):
    policy = PiStarRECAPPolicy(own_config(models["internvl"][0], critic="iql", **FULL))
    batch = random_batch(policy.config, 8, seed=0)
    output = train(policy, batch)
    later = batch.next_observation._replace(images=255 - batch.next_observation.images)
    assert not torch.equal(train(policy, batch._replace(next_observation=later)).q_loss, output.q_loss)


@pytest.mark.parametrize("kind", ["frozen", "lora", "full"])
@pytest.mark.parametrize("name", ["paligemma", "llava", "internvl"])
def test_an_export_gives_the_same_values_and_loads_in_transformers(models, tmp_path, name, kind):
    folder = tmp_path / "source"
    shutil.copytree(models[name][0], folder)
    overrides = {"frozen": {}, "lora": {"lora": LORA}, "full": FULL}[kind]
    policy = PiStarRECAPPolicy(own_config(folder, **overrides)).eval()
    wake(policy)
    observation = random_batch(policy.config, 4, seed=0).observation
    policy.save_pretrained(tmp_path / "export")
    shutil.rmtree(folder)  # an export stands for itself
    loaded = load_pretrained(tmp_path / "export")
    assert torch.equal(predict_values(loaded.policy, observation).value, predict_values(policy, observation).value)
    assert isinstance(loaded.tokenizer, OwnTokenizer)
    assert loaded.tokenizer.encode("move  the\ndot") == [3, 4, 5]

    vlm = tmp_path / "export" / "vlm"
    plain = AutoModel.from_pretrained(vlm).eval()
    whole = AutoModelForImageTextToText.from_pretrained(vlm).eval()
    ours = {n.replace(".base_layer", ""): p for n, p in policy.vlm.network.named_parameters() if "lora_" not in n}
    for theirs in (plain, whole.model):
        assert all(torch.equal(ours[n], p) for n, p in theirs.named_parameters()), name


def test_what_an_export_leaves_out_because_it_matters_to_nothing_is_not_missed(models, tmp_path):
    folder, _ = models["llava"]
    policy = PiStarRECAPPolicy(own_config(folder, **FULL)).eval()
    lean = tmp_path / "lean"
    shutil.copytree(folder, lean)
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    kept = {n: v for n, v in whole.state_dict().items() if "post_layernorm" not in n and "encoder.layers.1." not in n}
    whole.save_pretrained(lean, state_dict=kept)
    observation = observe()
    again = PiStarRECAPPolicy(own_config(lean, **FULL)).eval()
    assert torch.equal(encode(again.vlm, observation).hidden, encode(policy.vlm, observation).hidden)


# -- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_an_architecture_that_wants_more_than_pixels_is_refused_in_one_line(tmp_path, name):
    config = own_config(save(build(name), tmp_path))
    with pytest.raises(UsageError) as caught:
        check_vlm(config)
    line = str(caught.value)
    assert line.startswith(f"value.vlm_model_name: a {name} cannot be asked for image features of pixels alone (")
    assert line.endswith("LLaVA (1.5), InternVL, Aya Vision or Command A Vision would do") and "\n" not in line


def change_json(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: change_json(f, "config.json", model_type="llama"), "holds a llama, no image-text-to-text model"),
        (lambda f: change_json(f, "config.json", model_type="pi7"), "config.json cannot be read"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "has no preprocessor_config.json with image_mean"),
        (lambda f: (f / "preprocessor_config.json").write_text("nonsense"), "preprocessor_config.json cannot be read"),
        (lambda f: change_json(f, "preprocessor_config.json", image_std=[1, 0, 1]), "with image_mean and image_std"),
        (lambda f: change_json(f, "preprocessor_config.json", image_mean=0.5), "with image_mean and image_std"),
    ],
)
def test_a_folder_that_is_not_what_it_should_be_is_one_line(models, tmp_path, damage, message):
    folder = tmp_path / "model"
    shutil.copytree(models["llava"][0], folder)
    damage(folder)
    with pytest.raises(UsageError) as caught:
        check_vlm(own_config(folder))
    assert str(caught.value).startswith("value.vlm_model_name: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_named(models, tmp_path):
    folder, model = tmp_path / "model", models["llava"][1]
    shutil.copytree(models["llava"][0], folder)
    name = "model.language_model.norm.weight"
    for tensors, message in (
        ({n: v for n, v in model.state_dict().items() if n != name}, "no tensor for 1 parameters.*norm.weight"),
        (model.state_dict() | {name: torch.zeros(5)}, r"norm.weight' has shape \(5,\), the model needs \(32,\)"),
    ):
        model.save_pretrained(folder, state_dict=tensors)
        with pytest.raises(UsageError, match=rf"value.vlm_model_name: .* does not hold this llava: .*{message}"):
            backbone(folder)


def test_the_image_size_is_the_architectures(models):
    with pytest.raises(UsageError, match=r"model.image_size: 64, but .*internvl sees 32 px; set it to that"):
        check_vlm(own_config(models["internvl"][0], model={"image_size": 64}))


def test_pixels_that_are_not_normalised_are_left_in_zero_to_one(models, tmp_path):
    shutil.copytree(models["llava"][0], tmp_path / "model")
    change_json(tmp_path / "model", "preprocessor_config.json", do_normalize=False)
    vlm = backbone(tmp_path / "model")
    assert vlm.image_mean.flatten().tolist() == [0, 0, 0] and vlm.image_std.flatten().tolist() == [1, 1, 1]


def test_a_name_that_is_nowhere_says_which_key(tmp_path):
    with pytest.raises(UsageError, match=r"^value.vlm_model_name: there is no folder"):
        check_vlm(own_config(tmp_path / "none"))


def test_a_run_starts_from_the_same_model_alone(models):
    config = own_config(models["llava"][0])
    check_vlm(config, models["llava"][0])
    with pytest.raises(UsageError, match=r"^training.start_from: .*internvl holds another model than value.vlm_model"):
        check_vlm(config, models["internvl"][0])
