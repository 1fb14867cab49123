"""Published weights -> export -> LeRobot's folder: every tensor where it belongs, and back bit for bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from recap_ds.cli.main import main
from recap_ds.errors import UsageError
from recap_ds.models.export_format import ExportRecord
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.weights.importer import import_weights
from recap_ds.weights.names import pi_names
from tests.weights.made_published import ACTIONS, CHUNK, STATES, STEPS, config_of, published, random_modules

TINY = ["model.vlm_model_name=tiny"]  # it reads bytes
LEROBOT = {"chunk_size": CHUNK, "max_state_dim": STATES, "num_inference_steps": STEPS, "paligemma_variant": "gemma_2b"}
OPENPI = {"action_dim": ACTIONS, "action_horizon": CHUNK, "precision": "float32"}
EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"


@pytest.fixture(scope="module")
def tensors():
    """By version, under LeRobot's names."""
    made = {}
    for version in ("pi05", "pi0"):
        made[version] = published(*random_modules(version))
        made[version][HEAD] = torch.arange(60.0)[:, None] + torch.arange(20.0)
    return made


def write(folder, tensors, config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def without_prefix(tensors):
    return {name.removeprefix("model."): value for name, value in tensors.items()}


def same_bytes(first, second):
    assert first.keys() == second.keys()
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in ((first[name], second[name]) for name in first))


def check_policy(export, tensors):
    """Every parameter of the policy that ``export`` gives is the tensor that was published for it."""
    policy, names = PiStarRECAPPolicy.from_pretrained(export), pi_names(list(tensors))
    assert not policy.action_expert.indicator_in.weight.any()
    for module, places in ((policy.vlm.paligemma, names.vlm), (policy.action_expert, names.expert)):
        parameters = dict(module.named_parameters())
        assert parameters.keys() - places.keys() <= {"indicator_in.weight"}
        assert all(torch.equal(parameters[place], tensors[name].float()) for place, name in places.items())
    return policy


@pytest.mark.parametrize("version", ["pi05", "pi0"])
@pytest.mark.parametrize("form", ["lerobot", "openpi", "spelled out", "no config"])
def test_there_and_back(tmp_path, tensors, version, form):
    given = tensors[version] if form == "lerobot" else without_prefix(tensors[version])
    config = {"lerobot": {"type": version, **LEROBOT}, "openpi": OPENPI, "spelled out": config_of(version)}.get(form)
    imported = import_weights(write(tmp_path / "source", given, config), tmp_path / "export", TINY)
    assert (imported.kind, imported.form) == (version, "lerobot" if form == "lerobot" else "openpi")
    assert sum(group.num_tensors for group in imported.groups) == len(given)
    policy = check_policy(tmp_path / "export", given)
    assert policy.config.chunk_size == (50 if config is None else CHUNK)
    assert policy.config.data.normalization == {"pi05": "quantile", "pi0": "mean_std"}[version]
    assert main(["weights", "export", str(tmp_path / "export"), str(tmp_path / "back"), "--format", "lerobot"]) == 0
    assert same_bytes(load_file(tmp_path / "back/model.safetensors"), tensors[version])
    settings = json.loads((tmp_path / "back/config.json").read_text())
    assert (settings["type"], settings["chunk_size"]) == (version, policy.config.chunk_size)
    for name in ("policy_preprocessor", "policy_postprocessor"):
        assert json.loads((tmp_path / f"back/{name}.json").read_text())["name"] == name


def test_every_dtype_comes_back(tmp_path, tensors):
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    mixed = {name: value.to(kinds[i % 3]) for i, (name, value) in enumerate(sorted(tensors["pi05"].items()))}
    narrow = {name: value.bfloat16() for name, value in tensors["pi05"].items()}
    for given, dtype in ((mixed, "float32"), (narrow, "bfloat16")):
        source = write(tmp_path / f"from_{dtype}", given, config_of("pi05"))
        assert import_weights(source, tmp_path / dtype, TINY).record.dtype == dtype
        check_policy(tmp_path / dtype, given)
        main(["weights", "export", str(tmp_path / dtype), str(tmp_path / f"{dtype}_back"), "--format", "lerobot"])
        assert same_bytes(load_file(tmp_path / f"{dtype}_back/model.safetensors"), given)


def test_a_head_that_is_the_embedding_is_kept_once(tmp_path, tensors):
    tied = {**tensors["pi05"], HEAD: tensors["pi05"][EMBEDDING].clone()}
    head_alone = without_prefix({name: value for name, value in tied.items() if name != EMBEDDING})
    for number, given in enumerate((tied, head_alone)):
        import_weights(write(tmp_path / f"source{number}", given, config_of("pi05")), tmp_path / f"{number}", TINY)
        assert list(load_file(tmp_path / f"{number}/unread.safetensors")) == [
            "paligemma_with_expert.gemma_expert.lm_head.weight"
        ]
        main(["weights", "export", str(tmp_path / f"{number}"), str(tmp_path / f"back{number}"), "--format=lerobot"])
        assert same_bytes(load_file(tmp_path / f"back{number}/model.safetensors"), tied)


def test_the_lines_it_prints_are_the_account(tmp_path, tensors, capsys):
    source = write(tmp_path / "source", tensors["pi05"], config_of("pi05"))
    assert main(["weights", "import", source, str(tmp_path / "export"), *TINY, "chunk_size=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pi05 in lerobot form"
    total = sum(value.numel() for value in tensors["pi05"].values())
    assert lines[-2].split()[0] == f"{total:,}" and "none missing, none unknown" in lines[-2]
    counts = {line.split("tensors")[1].strip(): line.split()[0] for line in lines[1:-2]}
    assert counts["token embedding"] == "1,200" and counts["not read here, kept beside"] == f"{60 * 20 + 60 * 12:,}"
    assert PiStarRECAPPolicy.from_pretrained(tmp_path / "export").config.chunk_size == 7
    assert "was trained here" in (tmp_path / "export/README.md").read_text()
    assert main(["weights", "import", source, str(tmp_path / "export"), *TINY]) == 2
    assert "holds an export; give --overwrite" in capsys.readouterr().err
    assert main(["weights", "import", source, str(tmp_path / "export"), *TINY, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.time_mlp_in.bias"), r"holds no tensor for 'time_mlp_in.bias' of the action expert"),
        (lambda t: t.pop("model.time_mlp_in.weight"), r"holds neither 'time_mlp_in' \(pi0.5\) nor"),
        (lambda t: t.pop("model.action_in_proj.weight"), r"holds no tensor 'action_in_proj.weight'"),
        (
            lambda t: t.pop(EMBEDDING.replace("embed_tokens", "norm")),
            r"holds no tensor for 'language_model.norm.weight'",
        ),
        (lambda t: t.update({"model.more": torch.zeros(1)}), r"'model.more' has no place in a pi05 model"),
        (lambda t: t.update({"model.action_in_proj.bias": torch.zeros(3)}), r"bias' is \[3\], the model needs \[12\]"),
        (lambda t: t.update({"action_in_proj.bias": torch.zeros(12)}), r"are the same tensor; keep one"),
        (lambda t: t.update({"model.action_in_proj.bias": torch.zeros(12).double()}), r"is F64; weights are F32"),
        (lambda t: t.update({EMBEDDING: torch.zeros(60)}), r"has shape \[60\], not 2 dims"),
        (
            lambda t: t.update({EMBEDDING.replace("embed_tokens", "layers.9.mlp.gate_proj"): torch.zeros(28, 20)}),
            r"holds no tensor of 'language_model.layers.2', but of layer 9",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, tensors, change, message):
    changed = dict(tensors["pi05"])
    change(changed)
    with pytest.raises(UsageError, match=message):
        import_weights(write(tmp_path / "source", changed, {"type": "pi05", **LEROBOT}), tmp_path / "export", TINY)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ({"type": "pi0"}, [], r"config.json: type is pi0, and the tensors are those of pi05"),
        ({"chunk_size": "many"}, [], r"config.json: chunk_size: Input should be a valid integer"),
        ({"max_state_dim": 0}, [], r"config.json: max_state_dim: Input should be greater than 0"),
        ([1], [], r"config.json: is no JSON object"),
        (None, ["model.colour=red"], r"unknown key 'model.colour'"),
        (None, ["training.stage=joint", "recap.sft=false"], r"training.stage: is policy for what holds no critic"),
        (None, ["lora.enabled=true"], r"lora.enabled: adapters are for training"),
        (None, ["max_action_dim=9"], r"weight' is \[12, 7\], the model needs \[12, 9\]"),
        (None, ["model.image_size=32"], r"model.image_size: 32, but this VLM sees 16 px"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, tensors, config, overrides, message):
    source = write(tmp_path / "source", tensors["pi05"], config)
    with pytest.raises(UsageError, match=message):
        import_weights(source, tmp_path / "export", [*TINY, *overrides])


def test_paths_that_are_nothing(tmp_path, tensors, capsys):
    def refused(path):
        assert main(["weights", "import", str(path), str(tmp_path / "export"), *TINY]) == 2
        return capsys.readouterr().err

    assert "there is no such file or folder" in refused(tmp_path / "none")
    assert "lacks any .safetensors file" in refused(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"")
    assert "is no .safetensors file; others may run code" in refused(tmp_path / "weights.pt")
    (tmp_path / "cut").mkdir()
    save_file({"some.tensor": torch.zeros(3)}, tmp_path / "cut/model.safetensors")
    assert "is no pi0, pi0.5 or PaliGemma by its tensors' names (the first is 'some.tensor')" in refused(
        tmp_path / "cut"
    )
    write(tmp_path / "cut", tensors["pi0"], None)
    whole = (tmp_path / "cut/model.safetensors").read_bytes()
    (tmp_path / "cut/model.safetensors").write_bytes(whole[:-5])
    assert "no whole safetensors file" in refused(tmp_path / "cut")
    (tmp_path / "cut/model.safetensors.index.json").write_text('{"weight_map": 3}')
    assert "is no index of safetensors files" in refused(tmp_path / "cut")


def test_one_file_will_do(tmp_path, tensors):
    write(tmp_path / "source", tensors["pi0"], OPENPI)
    shutil.move(tmp_path / "source/model.safetensors", tmp_path / "source/any.safetensors")
    imported = import_weights(str(tmp_path / "source/any.safetensors"), tmp_path / "export", TINY)
    assert imported.record == ExportRecord.load(tmp_path / "export")
    with pytest.raises(UsageError, match=r"is an export already; training.start_from takes it"):
        import_weights(str(tmp_path / "export"), tmp_path / "again", TINY)


def test_plain_paligemma(tmp_path):
    from transformers import PaliGemmaForConditionalGeneration

    whole = PaliGemmaForConditionalGeneration(random_modules("pi05")[0].config)
    whole.save_pretrained(tmp_path / "source")
    imported = import_weights(str(tmp_path / "source"), tmp_path / "export")
    assert (imported.kind, imported.record.heads) == ("paligemma", ())
    stored = load_file(tmp_path / "export/vlm/model.safetensors")
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in _names_of(stored, whole))
    with pytest.raises(UsageError, match=r"holds no action_expert"):
        PiStarRECAPPolicy.from_pretrained(tmp_path / "export")


def _names_of(stored, whole):
    known = whole.state_dict().keys()
    renamed = {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    for name, value in stored.items():
        start = next(start for start in renamed if name.startswith(start))
        now = renamed[start] + name.removeprefix(start)
        now = now if now in known else now.replace("vision_tower.vision_model.", "vision_tower.")
        yield now, value
