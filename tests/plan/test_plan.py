"""``recap-ds plan`` as its users meet it, on the tiny model, and the estimate's own rules."""

import pytest
import torch

from recap_ds.cli.main import main
from recap_ds.data.manifest import Manifest
from recap_ds.distributed.ds_config import load_ds_config
from recap_ds.envs.scripted import write_reach_shards
from recap_ds.plan.advice import find_mend, variants
from recap_ds.plan.estimate import Setting, estimate
from recap_ds.plan.files import file_sizes
from recap_ds.plan.hardware import COMPUTE_SHARE, GPUS, find_gpu
from recap_ds.plan.report import count_cameras
from recap_ds.plan.sizing import Sizer, with_training
from tests.distributed.harness import REPOSITORY
from tests.tiny import tiny_config

RECIPE = str(REPOSITORY / "launch" / "recipes" / "metaworld_tiny.yaml")
ZERO3 = str(REPOSITORY / "ds_configs" / "zero3.json")
A100 = GPUS["a100-80"]


@pytest.fixture(scope="module")
def config():
    return tiny_config(
        model={"freeze_vlm": False, "image_size": 64},
        training={"batch_size": 8, "global_batch_size": 512, "use_amp": True},
    )


@pytest.fixture(scope="module")
def sizer(config):
    return Sizer(config, torch.bfloat16, None, 2)


def setting_of(config, world, **zero):
    """With parameters of a tiny model sharded and gathered like those of a large one."""
    ds = load_ds_config(ZERO3)
    ds["zero_optimization"] |= {"stage3_param_persistence_threshold": 600, "reduce_bucket_size": 100_000, **zero}
    return Setting(config, ds, world)


def estimated(sizer, config, world, **zero):
    return estimate(sizer, setting_of(config, world, **zero), A100, 8)


def without_evaluation(config):
    return config.model_copy(update={"data": config.data.model_copy(update={"held_out_fraction": 0.0})})


def test_a_recipe_is_planned(capsys):
    assert (
        main(["plan", "--config", RECIPE, "--deepspeed", ZERO3, "--gpus", "2", "training.global_batch_size=512"]) == 0
    )
    out = capsys.readouterr().out
    assert "the tiny preset" in out
    assert "assumed; data.cameras or data.shards would say" in out
    rows = [line.split() for line in out.splitlines() if line[:4].strip().isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "8", "16", "32"]
    assert all("yes" in row for row in rows)
    assert "Step time and MFU are estimates" in out
    assert "per checkpoint" in out
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read"),
        (["--config", RECIPE, "training.batchsize=3"], "unknown key 'training.batchsize'; did you mean"),
        (["--config", RECIPE, "--deepspeed", "none.json"], "--deepspeed none.json: No such file"),
        (["--config", RECIPE, "--gpus", "0"], "--gpus 0: give a number from 1 to 4096"),
        (["--config", RECIPE, "--gpus-per-node", "-1"], "--gpus-per-node -1: give a number from 1"),
        (["--config", RECIPE, "--gpu-memory", "nan"], "--gpu-memory nan: give GiB from 1 to 1024"),
        (["--config", RECIPE, "--gpu-memory", "0"], "--gpu-memory 0.0: give GiB from 1 to 1024"),
        (["--config", RECIPE, "--gpu-memory", "lots"], "argument --gpu-memory: invalid float value: 'lots'"),
        (["--config", RECIPE, "--gpu", "v100"], "argument --gpu: invalid choice: 'v100'"),
        (["--config", RECIPE, "--gpus", "3", "training.global_batch_size=512"], "512 is not batch_size"),
        (["--config", RECIPE, "data.shards=."], "manifest.json: missing"),
        (["--config", RECIPE, "data.cameras=[]"], "data.cameras: must name at least one camera"),
        ([], "the following arguments are required: --config"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(arguments, message, capsys):
    given = arguments if "--deepspeed" in arguments else [*arguments, "--deepspeed", ZERO3]
    try:
        code = main(["plan", *given])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.strip().count("\n") == 0
    assert captured.out == ""


def test_a_number_of_gpus_that_does_not_divide_is_said_in_its_row(capsys):
    settings = ["training.batch_size=4", "training.global_batch_size=48"]
    assert main(["plan", "--config", RECIPE, "--deepspeed", ZERO3, "--gpus", "4", *settings]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line[:4].strip().isdigit()}
    assert "48 = 4x3x4" in rows["4"]
    assert "training.global_batch_size: 48 is not batch_size 4 x 8 ranks" in rows["8"]


def test_the_cameras_of_a_folder_of_shards(config, tmp_path):
    folder = str(tmp_path / "shards")
    write_reach_shards(folder, num_demo=2, num_auto=2, num_intervention=1, size=32)
    slots = config.data.model_copy(update={"camera_slots": {"base": "front", "left": None, "right": None}})
    assert count_cameras(config.model_copy(update={"data": slots})) == (3, "data.camera_slots")
    data = config.data.model_copy(update={"shards": folder})
    assert count_cameras(config.model_copy(update={"data": data})) == (len(Manifest.load(folder).cameras), folder)


def test_more_gpus_hold_less_each(sizer, config):
    one, eight, many = (estimated(sizer, config, world) for world in (1, 8, 32))
    assert eight.memory.optimizer == pytest.approx(one.memory.optimizer / 8, rel=0.02)
    assert many.memory.total < one.memory.total
    assert one.traffic == (0, 0, 0)
    assert one.sizes.total == eight.sizes.total == many.sizes.total == 512


def test_step_time_lies_between_all_hidden_and_none(sizer, config):
    alone = estimated(sizer, config, 1)
    flops = sizer.measure(8, False, sharded=True).flops * 64
    assert alone.step_seconds.low == pytest.approx(flops / (A100.bf16_tflops * 1e12 * COMPUTE_SHARE.high))
    assert alone.model_flops_utilisation == pytest.approx((COMPUTE_SHARE.low, COMPUTE_SHARE.high))
    together = estimated(sizer, config, 8)
    assert together.model_flops_utilisation.low < alone.model_flops_utilisation.low


def test_recomputation_costs_utilisation(sizer, config):
    recomputed = estimated(sizer, with_training(config, activation_checkpointing=True), 1)
    assert recomputed.model_flops_utilisation.high < COMPUTE_SHARE.high
    assert recomputed.memory.activations < estimated(sizer, config, 1).memory.activations


def test_hpz_keeps_gathers_within_the_node(sizer, config):
    plain, hpz = estimated(sizer, config, 16), estimated(sizer, config, 16, zero_hpz_partition_size=8)
    assert plain.traffic.within_node == 0
    updated = 2 * sum(p.numel for p in sizer.parameters if p.group) * 15 / 16
    assert hpz.traffic.gathered - hpz.traffic.within_node == pytest.approx(updated, abs=2)
    assert hpz.memory.weights > 2 * plain.memory.weights
    assert hpz.step_seconds.high < plain.step_seconds.high


def test_offload_moves_what_it_frees(sizer, config):
    plain = estimated(sizer, config, 8)
    offloaded = estimated(sizer, config, 8, offload_optimizer={"device": "cpu"})
    assert offloaded.memory.optimizer == offloaded.memory.gradients == offloaded.memory.averages == 0
    assert offloaded.memory.host > plain.memory.optimizer + plain.memory.averages


def test_evaluation_holds_the_weights_that_the_average_replaces(sizer, config):
    plain, no_average = estimated(sizer, config, 1), estimated(sizer, with_training(config, ema_decay=None), 1)
    trainable = sum(p.numel for p in sizer.parameters if p.group)
    assert plain.memory.moments["evaluation"] - no_average.memory.moments["evaluation"] == 2 * trainable
    assert "evaluation" not in estimated(sizer, without_evaluation(config), 1).memory.moments


def mend(sizer, setting, total_bytes):
    """What makes it fit into a kilobyte less than ``total_bytes``."""
    return find_mend(sizer, setting, A100, 8, (total_bytes - 1024) / 2**30)


def test_a_mend_is_one_change_on_top_of_another(sizer, config):
    setting = setting_of(without_evaluation(config), 1)
    texts, result = mend(sizer, setting, estimate(sizer, setting, A100, 8).memory.total)
    assert texts == ["training.activation_checkpointing=true"]
    texts, smaller = mend(sizer, setting, result.memory.total)
    assert texts == ["training.activation_checkpointing=true", "training.batch_size=4"]
    assert smaller.sizes.total == 512
    texts, _ = mend(sizer, setting, smaller.memory.total)
    assert texts[0] == "offload_optimizer to the host"  # the step holds most by then; smaller changes start anew
    assert mend(sizer, setting, 10 * 2**20) is None


def test_where_evaluation_is_too_large_its_batch_shrinks(sizer, config):
    setting = setting_of(config, 1)
    before = estimate(sizer, setting, A100, 8).memory
    assert before.fullest == "evaluation"
    texts, after = mend(sizer, setting, before.total)
    assert texts == ["evaluation.batch_size=16"]
    assert after.memory.total < before.total


def test_the_second_copy_of_the_shards_goes_first(sizer, config):
    setting = setting_of(config, 16, zero_hpz_partition_size=8)
    texts, _ = mend(sizer, setting, estimate(sizer, setting, A100, 8).memory.total)
    assert texts == ["without zero_hpz_partition_size"]


def test_the_global_batch_stays_where_accumulation_was_given(sizer, config):
    fixed = with_training(
        without_evaluation(config),
        global_batch_size=None,
        gradient_accumulation_steps=3,
        activation_checkpointing=True,
    )
    setting = setting_of(fixed, 1)
    texts, result = mend(sizer, setting, estimate(sizer, setting, A100, 8).memory.total)
    assert texts == ["training.batch_size=4 training.gradient_accumulation_steps=6"]
    assert result.sizes.total == 24


def test_variants_turn_one_thing_at_a_time(config):
    zero3, zero2 = (load_ds_config(REPOSITORY / "ds_configs" / f"{name}.json") for name in ("zero3", "zero2"))
    texts = [variant.text for variant in variants(Setting(config, zero3, 16), 8)]
    assert texts == [
        "training.activation_checkpointing=true",
        "offload_optimizer to the host",
        "zero_hpz_partition_size 8",
    ]
    assert len(variants(Setting(config, zero2, 16), 8)) == 2


def test_files(sizer, config):
    sizes = file_sizes(sizer, config, torch.bfloat16)
    trainable = sum(p.numel for p in sizer.parameters if p.group)
    online = sum(p.numel for p in sizer.parameters if p.name.startswith("critic.q."))
    assert sizes.checkpoint == 4 * (3 * trainable + trainable + online)
    assert sizes.export == 4 * sum(p.numel for p in sizer.parameters)
    assert sizes.base == 0  # a trained VLM is in every checkpoint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", 989),
        ("Tesla V100", None),
        ("", None),
    ],
)
def test_gpus_are_known_by_their_driver_s_name(name, expected):
    gpu = find_gpu(name)
    assert (gpu and gpu.bf16_tflops) == expected
