"""The DeepSpeed JSON: what is refused, and what "auto" becomes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recap_ds.config import BatchSizes, PiStarRECAPConfig
from recap_ds.distributed.ds_config import load_ds_config, resolve_ds_config
from recap_ds.errors import UsageError
from tests.distributed.harness import REPOSITORY

SHIPPED = sorted((REPOSITORY / "ds_configs").glob("*.json"))
ZERO3 = {"zero_optimization": {"stage": 3}}
SIZES = BatchSizes(micro=4, accumulation=2, world=8)


def write(folder: Path, content: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def resolve(ds: dict[str, Any], on_cpu: bool = False, sizes: BatchSizes = SIZES, **training: Any):
    return resolve_ds_config(ds, PiStarRECAPConfig(training=training), sizes, on_cpu)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("on_cpu", [True, False])
def test_shipped_configs_resolve_completely(path, on_cpu):
    resolved, precision = resolve(load_ds_config(path), on_cpu, max_grad_norm=0.5)
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 64
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["timers"]["throughput"] == {"enabled": False, "synchronized": False}
    assert precision.dtype == (torch.float32 if on_cpu else torch.bfloat16)
    assert resolved["zero_optimization"]["reduce_bucket_size"] == (1_000_000 if on_cpu else 100_000_000)


def test_there_are_four_shipped_configs():
    assert [path.stem for path in SHIPPED] == ["zero2", "zero3", "zero3_hpz", "zero3_offload"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}', "'bf16' appears twice"),
        ({**ZERO3, "gradient_cliping": 1.0}, "did you mean 'gradient_clipping'"),
        ({**ZERO3, "fp16": {"enabled": True}}, "did you mean 'bf16'"),
        ({**ZERO3, "elasticity": {}}, "'elasticity' is not a setting"),
        ({**ZERO3, "train_batch_size": 8}, "set by training.global_batch_size"),
        ({**ZERO3, "optimizer": {"type": "AdamW"}}, "set by training"),
        ({**ZERO3, "gradient_clipping": 1.0}, "set by training.max_grad_norm"),
        ({}, "stage must be 2 or 3, not None"),
        ({"zero_optimization": {"stage": 1}}, "stage must be 2 or 3, not 1"),
        ({"zero_optimization": 3}, "'zero_optimization' must be an object"),
        ({**ZERO3, "bf16": {"enabled": "yes"}}, "bf16.enabled must be true, false"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, 'device must be "cpu"'),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}}, "ratio need"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}}, "written in place"),
    ],
)
def test_mistakes_are_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(UsageError) as raised:
        load_ds_config(write(tmp_path, content))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load_ds_config(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 3, "stage3_prefech_bucket_size": 1}, "zero_optimization.stage3_prefech_bucket_size"),
        ({"stage": 3, "sub_group_size": "auto"}, 'zero_optimization.sub_group_size: "auto" is not known'),
        ({"stage": 3, "reduce_bucket_size": "big"}, "zero_optimization.reduce_bucket_size"),
        ({"stage": 3, "zero_hpz_partition_size": 3}, "8 ranks do not divide into groups of 3"),
        ({"stage": 2, "zero_hpz_partition_size": 4}, "needs stage 3"),
    ],
)
def test_mistakes_within_zero_optimization(zero, message):
    with pytest.raises(UsageError) as raised:
        resolve({"zero_optimization": zero})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("enabled", "training", "on_cpu", "dtype"),
    [
        ("auto", {}, False, torch.bfloat16),
        ("auto", {}, True, torch.float32),
        ("auto", {"use_amp": True}, True, torch.float32),
        ("auto", {"use_amp": False}, False, torch.float32),
        (True, {}, True, torch.bfloat16),
        (False, {}, False, torch.float32),
        (True, {"use_amp": True}, True, torch.bfloat16),
        (False, {"use_amp": False}, False, torch.float32),
    ],
)
def test_precision(enabled, training, on_cpu, dtype):
    resolved, precision = resolve({**ZERO3, "bf16": {"enabled": enabled}}, on_cpu, **training)
    assert precision.dtype == dtype
    assert resolved["bf16"]["enabled"] is (dtype == torch.bfloat16)
    assert precision.text.startswith("precision: bf16" if dtype == torch.bfloat16 else "precision: fp32")


@pytest.mark.parametrize("enabled", [True, False])
def test_precision_that_contradicts_an_explicit_use_amp_is_refused(enabled):
    with pytest.raises(UsageError, match="contradicts"):
        resolve({**ZERO3, "bf16": {"enabled": enabled}}, use_amp=not enabled)


def test_given_sizes_are_kept_and_the_input_is_not_changed():
    ds = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 12345}}
    before = json.dumps(ds)
    resolved, _ = resolve(ds)
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 12345
    assert resolved["zero_optimization"]["stage3_param_persistence_threshold"] == 100_000
    assert json.dumps(ds) == before


@pytest.mark.parametrize(("world", "size"), [(1, 1), (4, 4), (8, 8), (32, 8)])
def test_secondary_shards_fit_a_smaller_job(world, size):
    ds = load_ds_config(REPOSITORY / "ds_configs" / "zero3_hpz.json")
    resolved, _ = resolve(ds, sizes=BatchSizes(micro=1, accumulation=1, world=world))
    assert resolved["zero_optimization"]["zero_hpz_partition_size"] == size
