"""Building a model straight into ZeRO-3 shards, and looking at whole parameters afterwards.

Inside ``sharded_build`` a child's weights are already partitioned when its parent's ``__init__`` goes on:
initialising them from the parent, deepcopy and load_state_dict are silent no-ops there. Put special initialisation in
the leaf's own ``reset_parameters``. Float buffers made with an explicit dtype are cast down too: compute tables lazily.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters, Init
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from deepspeed.utils import groups
from torch.nn import Parameter

from recap_ds.distributed.linear import replace_linear


def parameter_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32


@contextlib.contextmanager
def sharded_build(ds_config: dict[str, Any]) -> Iterator[None]:
    """Construct the model inside: every parameter gets the engine's dtype and, under stage 3, is sharded at once.

    transformers' ``from_pretrained`` and ``from_config`` join in. All modules of one engine belong in here: an engine
    with some sharded and some plain parameters does not cast the plain ones. Collective: every rank must call.
    """
    if ds_config["zero_optimization"]["stage"] == 3:
        with (
            _hugging_face_knows(ds_config),
            Init(
                config_dict_or_path=ds_config,
                # hpZ's group is a process-wide global of DeepSpeed: a second Init may only reuse it.
                zero_param_parallel_group=_secondary_group(ds_config),
            ),
        ):
            replace_linear()
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(parameter_dtype(ds_config))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _secondary_group(ds_config: dict[str, Any]) -> Any:
    if ds_config["zero_optimization"].get("zero_hpz_partition_size", 1) == 1:
        return None
    return groups._get_zero_param_intra_parallel_group()


@contextlib.contextmanager
def _hugging_face_knows(ds_config: dict[str, Any]) -> Iterator[None]:
    """transformers shards what it loads only while a ``HfDeepSpeedConfig`` lives: it keeps a weak reference."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # transformers opens an Init of its own inside ours, which must not create hpZ's group a second time; the outer
    # Init decides how parameters are partitioned.
    zero = {**ds_config["zero_optimization"], "zero_hpz_partition_size": 1}
    living = HfDeepSpeedConfig({**ds_config, "zero_optimization": zero})
    try:
        yield
    finally:
        del living
        unset_hf_deepspeed_config()


def param_is_sharded(param: Parameter) -> bool:
    return is_zero_param(param)


def whole_numel(param: Parameter) -> int:
    """Elements of the whole parameter, however it is kept."""
    return param.ds_numel if param_is_sharded(param) else param.numel()


@contextlib.contextmanager
def gather(params: Iterable[Parameter], modifier_rank: int | None = None) -> Iterator[None]:
    """Whole values of ``params`` inside; plain parameters are left as they are. Collective: every rank must call.

    Writes survive only with ``modifier_rank``, whose values every rank then gets, and only before the engine is built:
    afterwards the fp32 masters, which this does not touch, overwrite them at the next step (see ``tiles.write_tile``).
    """
    with GatheredParameters(list(params), modifier_rank=modifier_rank):
        yield
