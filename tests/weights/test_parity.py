"""The parity command: references of an independent one-pass form, in other dims, and what can be wrong with one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recap_ds.batch import Observation
from recap_ds.cli.main import main
from recap_ds.errors import UsageError
from recap_ds.weights.parity import measure
from tests.models.pi_one_pass import one_pass_velocity
from tests.weights.made_published import (
    ACTIONS,
    CHUNK,
    SIDE,
    STATES,
    STEPS,
    config_of,
    published,
    random_modules,
)

BATCH, TOKENS = 3, 6
REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "pi05_fixture"


@torch.no_grad()
def write_reference(folder, version):
    """A folder in the fixture's form, its outputs from the one-pass form."""
    paligemma, expert = random_modules(version)
    generator = torch.Generator().manual_seed(1)
    actions, noise = torch.randn(2, BATCH, CHUNK, ACTIONS, generator=generator)
    pixels = torch.rand(BATCH, 3, 3, SIDE, SIDE, generator=generator) * 2 - 1
    time = torch.tensor([0.05, 0.5, 1.0])
    tokens = torch.randint(0, 60, (BATCH, TOKENS), generator=generator)
    token_mask = torch.arange(TOKENS) < torch.tensor([[6], [2], [4]])
    cameras = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])
    state = torch.randn(BATCH, STATES, generator=generator)
    observation = Observation(pixels, cameras, tokens, token_mask, state)
    x_t = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
    loss = (noise - actions - one_pass_velocity(paligemma, expert, observation, pixels, x_t, time)) ** 2
    x = noise
    for step in range(STEPS):
        now = torch.full((BATCH,), 1.0 - step / STEPS)
        x = x - one_pass_velocity(paligemma, expert, observation, pixels, x, now) / STEPS

    arrays = {"tokens": tokens, "token_mask": token_mask, "actions": actions, "noise": noise, "time": time}
    arrays |= {"x_t": x_t, "loss": loss, "sampled": x, "state": state}
    for i in range(3):
        arrays |= {f"image{i}": pixels[:, i], f"image_mask{i}": cameras[:, i]}
    np.savez(folder / "io.npz", **{name: value.numpy() for name, value in arrays.items()})
    (folder / "config.json").write_text(json.dumps(config_of(version)))
    save_file(published(paligemma, expert), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("version", ["pi05", "pi0"])
def test_it_agrees_with_the_one_pass_form(tmp_path, capsys, version):
    write_reference(tmp_path, version)
    assert main(["weights", "parity", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and set(report["max_abs_error"]) == {"velocity", "loss", "sampled"}
    assert max(report["max_abs_error"].values()) < 2e-5


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference made with LeRobot is not beside this checkout")
def test_it_agrees_with_lerobot(capsys):
    assert main(["weights", "parity", str(REFERENCE)]) == 0
    assert max(json.loads(capsys.readouterr().out)["max_abs_error"].values()) < 2e-5


@pytest.fixture
def reference(tmp_path):
    return write_reference(tmp_path, "pi05")


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_io(folder, **arrays):
    with np.load(folder / "io.npz") as stored:
        kept = {name: stored[name] for name in stored.files}
    np.savez(folder / "io.npz", **{name: value for name, value in {**kept, **arrays}.items() if value is not None})


def test_a_wrong_weight_fails_and_a_broken_one_too(reference, capsys):
    def scale(by):
        def change(tensors):
            tensors["model.action_out_proj.bias"] *= by

        return change

    change_tensors(reference, scale(1.01))
    assert main(["weights", "parity", str(reference)]) == 1
    assert not json.loads(capsys.readouterr().out)["passed"]
    change_tensors(reference, scale(float("nan")))
    assert main(["weights", "parity", str(reference)]) == 1
    assert json.loads(capsys.readouterr().out)["max_abs_error"]["sampled"] is None


def test_openpi_spells_the_same_tensors_without_a_prefix_and_the_embedding_as_a_head(reference):
    embedding = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"

    def respell(tensors):
        tensors["model.paligemma_with_expert.paligemma.lm_head.weight"] = tensors.pop(embedding)
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change_tensors(reference, respell)
    assert max(measure(reference)) < 2e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.time_mlp_in.bias"), r"no tensor for 1 parameters, the first is 'time_mlp_in.bias'"),
        (lambda t: t.update({"model.more": torch.zeros(1)}), r"tensor 'more' has no place"),
        (
            lambda t: t.update({"model.action_in_proj.bias": torch.zeros(3)}),
            r"has shape \(3,\), the model needs \(12,\)",
        ),
        (lambda t: t.update({"action_in_proj.bias": torch.zeros(12)}), r"are the same tensor; keep one"),
    ],
)
def test_weights_are_loaded_strictly(reference, change, message):
    change_tensors(reference, change)
    with pytest.raises(UsageError, match=message):
        measure(reference)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"time": None}, r"has no 'time'"),
        ({"image2": None}, r"has no 'image2'"),
        ({"time": np.zeros(0)}, r"'time' holds no samples"),
        ({"loss": np.zeros((3, 5, 8))}, r"'loss' has shape \[3, 5, 8\]; config.json makes that \[3, 5, 7\]"),
        ({"tokens": np.full((3, 6), 60)}, r"'tokens' go up to 60; config.json has 60 words"),
        ({"tokens": np.zeros((3, 6))}, r"'tokens' holds float64, not whole numbers"),
        ({"noise": np.full((3, 5, 7), "a")}, r"'noise' holds <U1, not numbers"),
        ({"x_t": np.zeros((3, 5, 7))}, r"x_t is not time \* noise"),
        ({"noise": np.full((3, 5, 7), None)}, r"cannot be read \(Object arrays cannot be loaded"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(reference, arrays, message):
    change_io(reference, **arrays)
    with pytest.raises(UsageError, match=message):
        measure(reference)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("expert", "depth", 3, r"config.json: expert.depth is 3 and text.depth 2"),
        ("expert", "adarms", False, r"config.json: expert.adarms is False, and type pi05"),
        ("expert", "width", 13, r"config.json: expert.width is 13; it has to be even"),
        ("vision", "projection_dim", 21, r"config.json: vision.projection_dim is 21 and text.width 20"),
        ("vision", "num_attention_heads", 3, r"config.json: vision.hidden_size does not divide into 3 heads"),
        ("vision", "image_size", 3, r"config.json: vision.image_size is 3, less than one patch"),
        ("text", "num_kv_heads", 3, r"config.json: expert.num_kv_heads is 2 and text.num_kv_heads 3"),
        ("text", "width", "wide", r"config.json: text.width: Input should be a valid integer"),
        ("text", "color", 1, r"config.json: text.color: Extra inputs are not permitted"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(reference, part, key, value, message):
    config = json.loads((reference / "config.json").read_text())
    config[part][key] = value
    (reference / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        measure(reference)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "io.npz"])
def test_a_missing_or_damaged_file_is_one_line(reference, name, capsys):
    (reference / name).write_bytes(b"nothing of use")
    assert main(["weights", "parity", str(reference)]) == 2
    assert f"{name}: " in capsys.readouterr().err
    (reference / name).unlink()
    assert main(["weights", "parity", str(reference)]) == 2
    assert f"{name}: cannot be read" in capsys.readouterr().err
