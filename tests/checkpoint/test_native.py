"""DeepSpeed's own folders: beside our tiles, or alone with a recipe. Three ways to the same numbers."""

import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from recap_ds.checkpoint.consolidate import consolidate
from recap_ds.distributed.native import zero_to_fp32
from recap_ds.errors import UsageError
from recap_ds.models.export_format import Provenance
from recap_ds.models.pretrained import load_pretrained
from recap_ds.recipe import dump_config
from tests.checkpoint.checkpoint_worker import LAYOUTS
from tests.checkpoint.hand_made import CONTRACT, KINDS, assert_same, make_config

STEPS = {**dict.fromkeys(KINDS, "step_00000004"), **dict.fromkeys(LAYOUTS, "step_00000002")}


def native_of(two_ranks, run):
    return two_ranks[0] / run / "checkpoints" / STEPS[run] / "deepspeed/zero"


def weights_of(record):
    return {name: file for name, file in record.files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("run", STEPS)
def test_it_gives_the_export_that_our_tiles_give(two_ranks, tmp_path, run):
    native = native_of(two_ranks, run)
    ours = consolidate(native.parents[1], tmp_path / "ours", weights="raw")
    theirs = consolidate(native, tmp_path / "theirs")
    if run in LAYOUTS:  # in bf16: what is frozen in the engine, as the targets are, is saved as the forward reads it
        target = load_file(tmp_path / "ours/target_critic.safetensors")
        rounded = {name: value.bfloat16().float() for name, value in target.items()}
        assert_same(load_file(tmp_path / "theirs/target_critic.safetensors"), rounded)
    same = {name for name, file in ours.files.items() if theirs.files[name] == file}
    assert same == theirs.files.keys() - ({"target_critic.safetensors"} if run in LAYOUTS else set())
    assert theirs.provenance == ours.provenance.model_copy(update={"format": "deepspeed"})
    assert ours.provenance.world == 2 and len(ours.provenance.checkpoint_sha256) == 64


@pytest.mark.parametrize("kind", KINDS)
def test_deepspeeds_own_script_works_on_it_and_finds_what_deepspeed_gathered(two_ranks, tmp_path, kind):
    folder = native_of(two_ranks, kind).parent
    if kind == "lora":  # with frozen parameters, adapters and targets: as a user calls it
        command = [sys.executable, folder / "zero_to_fp32.py", folder, tmp_path, "--safe_serialization"]
        subprocess.run(command, check=True, capture_output=True)
    else:
        zero_to_fp32(str(folder / "zero"), str(tmp_path), 10**9)
    truth = {k.removeprefix("raw/"): v for k, v in load_file(two_ranks[0] / kind / "truth.safetensors").items()}
    script = load_file(tmp_path / "model.safetensors")
    assert_same(script, {name: truth[name] for name in script})
    trained = load_pretrained_tensors(native_of(two_ranks, kind), tmp_path / "export")
    assert script.keys() == trained.keys()
    assert_same(trained, script)


def load_pretrained_tensors(native, out):
    consolidate(native, out)
    return {name: param.detach() for name, param in load_pretrained(out).policy.named_parameters()}


@pytest.fixture
def bare(two_ranks, tmp_path):
    """A function that puts DeepSpeed's folder of a run, and its recipe, where no run is."""

    def move(kind):
        folder = shutil.copytree(native_of(two_ranks, kind).parent, tmp_path / kind)
        recipe = tmp_path / f"{kind}.yaml"
        recipe.write_text(dump_config(make_config(kind)))
        return folder, recipe

    return move


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_in_no_run_needs_a_recipe(bare, two_ranks, tmp_path, kind):
    folder, recipe = bare(kind)
    with pytest.raises(UsageError, match=r"lies in no run folder .* by --config"):
        consolidate(folder, tmp_path / "export")
    record = consolidate(folder, tmp_path / "export", config=recipe)  # by its `latest` file
    assert record.provenance == Provenance(run=f"tiny_{kind}", weights="raw", format="deepspeed", world=2)
    assert weights_of(record) == weights_of(consolidate(native_of(two_ranks, kind), tmp_path / "in_run"))
    assert load_pretrained(tmp_path / "export").contract is None
    CONTRACT.save(tmp_path)
    consolidate(folder / "zero", tmp_path / "export", config=recipe, overwrite=True)
    assert load_pretrained(tmp_path / "export").contract == CONTRACT


def test_a_recipe_of_another_model_is_refused(bare, tmp_path):
    folder, recipe = bare("lora")
    refusals = {
        "lora.enabled": (False, r"'vlm\..*lora_A.* is only in the checkpoint's"),
        "model.qv_hidden_size": (64, r"'critic\..* is \(1, 32\) there and \(1, 64\) by the recipe"),
        "training.stage": ("critic", r"'action_expert\..* is only in the checkpoint's"),
    }
    for key, (value, said) in refusals.items():
        section, name = key.split(".")
        config = make_config("lora")
        part = vars(config)[section].model_copy(update={name: value})
        recipe.write_text(dump_config(config.model_copy(update={section: part})))
        with pytest.raises(UsageError, match=rf"--config .*lora\.yaml: describes another model .*{said}"):
            consolidate(folder, tmp_path / "export", config=recipe)
    assert not (tmp_path / "export").exists()


def test_a_recipe_is_for_deepspeeds_folders_alone(two_ranks, tmp_path):
    with pytest.raises(UsageError, match="--config: only for a folder of DeepSpeed's own"):
        consolidate(two_ranks[0] / "full", tmp_path / "export", config=tmp_path / "recipe.yaml")


def test_there_is_no_average_in_it(bare, tmp_path):
    folder, recipe = bare("full")
    with pytest.raises(UsageError, match="holds no average"):
        consolidate(folder, tmp_path / "export", config=recipe, weights="ema")


def test_damage_in_a_run_is_found_by_our_checksums(two_ranks, tmp_path):
    run = shutil.copytree(two_ranks[0] / "full", tmp_path / "run", symlinks=True)
    native = run / "checkpoints/step_00000004/deepspeed/zero"
    file = native / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UsageError, match=r"rank_1_mp_rank_00_optim_states.pt was changed or damaged"):
        consolidate(native, tmp_path / "export")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(b"half"), "checkpoint cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "checkpoint cannot be read"),
        (lambda path: path.unlink(), "2 ranks wrote it and the files of 1 are there"),
        (lambda path: path.with_name("zero_pp_rank_1_mp_rank_00_model_states.pt").unlink(), "1 model states"),
    ],
    ids=["rubbish", "cut off", "missing", "no model states"],
)
def test_damage_elsewhere_is_one_line(bare, tmp_path, damage, said):
    folder, recipe = bare("full")
    damage(folder / "zero/zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(UsageError, match=r"DeepSpeed's checkpoint cannot be read .*choose another") as error:
        consolidate(folder, tmp_path / "export", config=recipe)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "export").exists()
