"""Where the VLM's sizes come from, without a download."""

import json

import pytest
import torch

from recap_ds.config import PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.models.vlm import tiny_config
from recap_ds.plan.architecture import vlm_architecture
from recap_ds.plan.measure import build_on_meta
from recap_ds.recipe import load_config
from tests.distributed.harness import REPOSITORY

PALIGEMMA = "google/paligemma-3b-pt-224"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_the_published_numbers_give_the_published_size():
    with vlm_architecture(PiStarRECAPConfig()) as architecture:
        assert "as published" in architecture.source
        policy = build_on_meta(PiStarRECAPConfig(), torch.bfloat16, architecture.folder)
    assert sum(p.numel() for p in policy.vlm.parameters()) == 2_923_466_480
    assert policy.vlm.width == 2048
    assert not policy.vlm.random_init


@pytest.mark.parametrize("name", ["pi05_lora", "pi05_full"])
def test_the_recipes_of_pi05_have_its_published_size(name):
    config = load_config(REPOSITORY / "launch" / "recipes" / f"{name}.yaml")
    with vlm_architecture(config) as architecture:
        assert "in pi05, numbers as published: weights/pi05 is not on this machine" in architecture.source
        policy = build_on_meta(config, torch.bfloat16, architecture.folder)
    modules = (policy.vlm, policy.action_expert)
    sizes = {name: p.numel() for module in modules for name, p in module.named_parameters() if "lora_" not in name}
    assert sum(sizes.values()) == 3_353_433_872


def test_the_weights_that_a_run_begins_with_are_believed(tmp_path):
    tiny_config(64).save_pretrained(tmp_path / "vlm")
    model, training = {"image_size": 64}, {"start_from": str(tmp_path)}
    with vlm_architecture(PiStarRECAPConfig(model=model, training=training)) as architecture:
        assert architecture == (str(tmp_path / "vlm"), f"{tmp_path}/vlm/config.json")


def test_adapters_are_sizes_too():
    config = PiStarRECAPConfig(lora={"enabled": True, "rank": 16})
    with vlm_architecture(config) as architecture:
        policy = build_on_meta(config, torch.bfloat16, architecture.folder)
    # Of every layer: q, o 2048x2048; k, v 2048x256; gate, up, down 2048x16384; each rank x (in + out).
    per_layer = 16 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 16384))
    assert sum(p.numel() for p in policy.vlm.parameters() if p.requires_grad) == 18 * per_layer


def test_the_tiny_vlm_needs_no_folder():
    with vlm_architecture(PiStarRECAPConfig(model={"vlm_model_name": "tiny"})) as architecture:
        assert architecture == (None, "the tiny preset")


def test_a_folder_is_believed(tmp_path):
    tiny_config(64).save_pretrained(tmp_path)
    config = PiStarRECAPConfig(model={"vlm_model_name": str(tmp_path), "image_size": 64})
    with vlm_architecture(config) as architecture:
        policy = build_on_meta(config, torch.bfloat16, architecture.folder)
    assert policy.vlm.width == 128
    assert architecture.source == f"{tmp_path}/config.json"


def test_the_hubs_cache_is_read(tmp_path):
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--someone--their-paligemma"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    tiny_config(64).save_pretrained(snapshot)
    assert json.loads((snapshot / "config.json").read_text())["model_type"] == "paligemma"
    config = PiStarRECAPConfig(model={"vlm_model_name": "someone/their-paligemma", "image_size": 64})
    with vlm_architecture(config) as architecture:
        assert architecture == (str(snapshot), "someone/their-paligemma, as cached from the hub")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"vlm_model_name": "someone/unknown"}, "'someone/unknown' is no folder, not in the hub's cache and not one"),
        ({"vlm_model_name": "./nowhere"}, "there is no folder ./nowhere"),
        (
            {"vlm_model_name": PALIGEMMA, "image_size": 448},
            "model.image_size: 448, but google/paligemma-3b-pt-224",
        ),
    ],
)
def test_what_is_not_known_is_refused(model, message):
    with pytest.raises(UsageError, match=message), vlm_architecture(PiStarRECAPConfig(model=model)):
        pass
