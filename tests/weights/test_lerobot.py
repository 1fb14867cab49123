"""A trained policy in LeRobot's form: with the advantage folded in it acts as it did; its processors say the same."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.batch import Observation
from recap_ds.cli.main import main
from recap_ds.models.building import Builder
from recap_ds.models.pi_joint import PiJointExpert
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import save_pretrained
from recap_ds.models.vlm import build_paligemma, encode_with_layers
from recap_ds.processing.contract import RobotContract
from recap_ds.processing.normalize import Affine, Normalizer
from recap_ds.recipe import load_config
from recap_ds.weights.importer import import_weights
from recap_ds.weights.lerobot import export_lerobot
from recap_ds.weights.names import load_pi_weights
from tests.made_export import CONTRACT
from tests.tiny import tiny_config, wake
from tests.weights.made_published import ACTIONS, CHUNK, SIDE, STATES, config_of, published, random_modules


def contract_of(method):
    center, scale = np.array([0.5, -2.0, 7.0], np.float32), np.array([2.0, 0.25, 1.0], np.float32)
    normalizer = Normalizer(method, Affine(center, scale, STATES), Affine(-center, 2 * scale, ACTIONS))
    return RobotContract.model_validate(
        {**CONTRACT.model_dump(), "normalizer": normalizer.to_dict(), "state_dim": 3, "action_dim": 3}
    )


@pytest.fixture(scope="module", params=["pi05", "pi0"])
def trained(request, tmp_path_factory):
    """(version, export) of a policy with an adapter and an indicator that are awake."""
    version, folder = request.param, tmp_path_factory.mktemp("trained")
    save_file(published(*random_modules(version)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(version)))
    import_weights(str(folder), folder / "imported", ["model.vlm_model_name=tiny"])
    config = load_config(folder / "imported/config.yaml", ["lora.enabled=true", "lora.rank=2"])
    policy = PiStarRECAPPolicy(config, vlm_folder=str(folder / "imported/vlm"))
    policy.action_expert.load_state_dict(load_file(folder / "imported/action_expert.safetensors"))
    wake(policy)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        policy.action_expert.indicator_in.weight.copy_(torch.randn(3, 12, generator=generator))
    save_pretrained(policy, contract_of("quantile" if version == "pi05" else "mean_std"), folder / "export")
    return version, folder / "export"


def observation():
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (2, 1, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(3, 60, (2, 5), generator=generator)
    every = torch.ones(2, 5, dtype=torch.bool)
    return Observation(images, every[:, :1], tokens, every, torch.randn(2, STATES, generator=generator))


@torch.no_grad()
@pytest.mark.parametrize("advantage", INDICATOR_IDS)
def test_it_acts_as_it_did_without_knowing_of_advantages(trained, tmp_path, advantage):
    export = trained[1]
    export_lerobot(export, tmp_path / "out", advantage)
    policy = PiStarRECAPPolicy.from_pretrained(export)
    paligemma = build_paligemma(policy.vlm.paligemma.config, Builder()).eval()
    expert = PiJointExpert(policy.action_expert.dims, STATES, ACTIONS).eval()
    load_pi_weights(tmp_path / "out/model.safetensors", paligemma, expert, Builder())

    seen, time = observation(), torch.tensor([[0.3], [0.9]])
    pixels, valid = seen.images.float() / 127.5 - 1, torch.ones(2, CHUNK, dtype=torch.bool)
    x_t = torch.randn(2, 1, CHUNK, ACTIONS, generator=torch.Generator().manual_seed(5))

    def velocity(expert, prefix, indicator):
        told = torch.full((2, 1), INDICATOR_IDS[indicator])
        return expert(expert.encode_prefix(prefix), seen.state, x_t, time, told, valid)

    ours = velocity(policy.action_expert, policy.vlm(seen, pixels), advantage)
    theirs = velocity(expert, encode_with_layers(paligemma, seen, pixels, checkpointing=False), "none")
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    other = velocity(
        policy.action_expert, policy.vlm(seen, pixels), "negative" if advantage == "positive" else "positive"
    )
    assert (ours - other).abs().max() > 1e-2


def test_processors_have_the_robots_units(trained, tmp_path):
    version, export = trained
    export_lerobot(export, tmp_path / "out")
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert settings["input_features"] == {
        "observation.images.front": {"type": "VISUAL", "shape": [3, SIDE, SIDE]},
        "observation.images.wrist": {"type": "VISUAL", "shape": [3, SIDE, SIDE]},
        "observation.state": {"type": "STATE", "shape": [3]},
    }
    assert settings["output_features"] == {"action": {"type": "ACTION", "shape": [3]}}
    before, after = (
        json.loads((tmp_path / f"out/policy_{side}processor.json").read_text()) for side in ("pre", "post")
    )
    names = [step.get("registry_name", step.get("class")) for step in before["steps"]]
    assert names[:2] == ["rename_observations_processor", "to_batch_processor"]
    (normalize,) = (step for step in before["steps"] if step.get("registry_name") == "normalizer_processor")
    statistics = load_file(tmp_path / "out" / normalize["state_file"])
    values = torch.tensor([3.0, 4.0, 5.0])
    expected = contract_of("quantile").normalizer["actions"]
    if version == "pi05":
        assert names.index("normalizer_processor") < names.index("pi05_prepare_state_tokenizer_processor_step")
        low, high = statistics["action.q01"], statistics["action.q99"]
        normalized = 2 * (values - low) / (high - low) - 1
    else:
        assert names.index("lerobot.policies.pi0.processor_pi0.Pi0NewLineProcessor") < names.index(
            "tokenizer_processor"
        )
        normalized = (values - statistics["action.mean"]) / statistics["action.std"]
    torch.testing.assert_close(
        normalized, (values - torch.tensor(expected["center"])) / torch.tensor(expected["scale"])
    )
    assert after["steps"][0]["registry_name"] == "unnormalizer_processor"
    assert load_file(tmp_path / "out" / after["steps"][0]["state_file"]).keys() == statistics.keys()


def test_rows_of_the_embedding_that_no_word_has_are_left_out(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recap_ds.weights.lerobot.NUM_ROWS", 60)
    monkeypatch.setattr("recap_ds.weights.lerobot.NUM_WORDS", 57)
    monkeypatch.setattr("recap_ds.files.tensors.PIECE_ELEMENTS", 7)
    assert main(["weights", "export", str(trained[1]), str(tmp_path / "out"), "--format", "lerobot"]) == 0
    assert "this policy has others: it will not load there" in capsys.readouterr().out
    written, whole = load_file(tmp_path / "out/model.safetensors"), load_file(trained[1] / "vlm/model.safetensors")
    towers = "model.paligemma_with_expert."
    rows = written[f"{towers}paligemma.model.language_model.embed_tokens.weight"]
    assert torch.equal(rows, whole["language_model.model.embed_tokens.weight"][:57])
    assert torch.equal(rows, written[f"{towers}paligemma.lm_head.weight"])
    assert written[f"{towers}gemma_expert.lm_head.weight"].shape == (57, 12)


def test_what_lerobot_has_no_policy_for_is_refused(trained, tmp_path, capsys):
    def refused(export, out=tmp_path / "out"):
        assert main(["weights", "export", str(export), str(out), "--format", "lerobot"]) == 2
        return capsys.readouterr().err

    save_pretrained(PiStarRECAPPolicy(tiny_config()), None, tmp_path / "dit")
    assert "LeRobot has no such policy; it has pi0 and pi0.5" in refused(tmp_path / "dit")
    model = {"action_expert": "pi_joint", "action_expert_num_heads": 4, "advantage_conditioning": "text"}
    config = tiny_config(model=model, training={"stage": "policy"}, recap={"sft": True})
    save_pretrained(PiStarRECAPPolicy(config), None, tmp_path / "words")
    assert "reads its advantage in words" in refused(tmp_path / "words")
    assert "model.safetensors" in export_lerobot(tmp_path / "words", tmp_path / "none told", "none").files
    assert "is there already; name a new folder" in refused(trained[1], trained[1])
    assert "cannot be read" in refused(tmp_path / "none")
    assert not (tmp_path / "out").exists()


def test_a_damaged_export_gives_nothing(trained, tmp_path, capsys):
    copy = shutil.copytree(trained[1], tmp_path / "copy")
    weights = copy / "action_expert.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert main(["weights", "export", str(copy), str(tmp_path / "out"), "--format", "lerobot"]) == 2
    assert "was changed or damaged" in capsys.readouterr().err and not (tmp_path / "out").exists()
