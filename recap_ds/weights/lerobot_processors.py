"""LeRobot's config.json of a pi0 / pi0.5 policy, and the pipelines that it runs around one.

As LeRobot 0.6 writes them: every step by the name it is registered under, the normaliser's statistics beside. What our
normaliser holds is affine; the statistics here are those that give the same map.
"""

import json
from pathlib import Path
from typing import Any

import torch

from recap_ds.config import PiStarRECAPConfig
from recap_ds.files.records import write_text
from recap_ds.files.tensors import TensorSource, write_tensor_file
from recap_ds.processing.contract import RobotContract
from recap_ds.processing.normalize import Affine, Normalizer

STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
PALIGEMMA = "google/paligemma-3b-pt-224"
# By its class, not by the name it is registered under: LeRobot's pi0.5 does not import it.
NEW_LINE = "lerobot.policies.pi0.processor_pi0.Pi0NewLineProcessor"
MODES = {"mean_std": "MEAN_STD", "quantile": "QUANTILES"}


def policy_config(config: PiStarRECAPConfig, contract: RobotContract | None, dtype: str) -> dict[str, Any]:
    """Without a ``contract``, LeRobot takes the features from its data set."""
    side, mode = config.model.image_size, MODES[config.data.normalization]
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    if contract is not None:
        inputs = {f"{IMAGES}{camera}": {"type": "VISUAL", "shape": [3, side, side]} for camera in contract.cameras}
        inputs[STATE] = {"type": "STATE", "shape": [contract.state_dim]}
        outputs = {ACTION: {"type": "ACTION", "shape": [contract.action_dim]}}
    return {
        "type": config.model.pi_version,
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
        # The sizes of both towers; LeRobot builds no others.
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": dtype,
        "chunk_size": config.chunk_size,
        "n_action_steps": config.chunk_size,
        "max_state_dim": config.max_state_dim,
        "max_action_dim": config.max_action_dim,
        "num_inference_steps": config.num_inference_steps,
        "image_resolution": [side, side],
        "tokenizer_max_length": config.model.max_prompt_tokens,
    }


def write_processors(folder: Path, config: PiStarRECAPConfig, contract: RobotContract | None, settings: dict) -> None:
    """``policy_preprocessor.json``, ``policy_postprocessor.json`` and the statistics that they name.

    Without a ``contract`` there are none: LeRobot puts those of its data set in.
    """
    statistics: dict[str, torch.Tensor] = {}
    if contract is not None:
        normalizer = Normalizer.from_dict(contract.normalizer)
        statistics |= _statistics(STATE, normalizer.state, normalizer.method)
        statistics |= _statistics(ACTION, normalizer.actions, normalizer.method)
    tokenizer = {
        "max_length": config.model.max_prompt_tokens,
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": PALIGEMMA,
    }
    normalize = ("normalizer_processor", _normalizer(settings, settings["input_features"]))
    to_device = ("device_processor", {"device": "cpu", "float_dtype": None})
    read_prompt = ("tokenizer_processor", tokenizer)
    begin = [("rename_observations_processor", {"rename_map": {}}), ("to_batch_processor", {})]
    if config.data.prompt_format == "pi05":
        steps = [*begin, normalize, ("pi05_prepare_state_tokenizer_processor_step", {}), read_prompt, to_device]
    else:
        steps = [*begin, (NEW_LINE, {}), read_prompt, to_device, normalize]
    _write_pipeline(folder, "policy_preprocessor", steps, statistics)
    unnormalize = ("unnormalizer_processor", _normalizer(settings, {}))
    _write_pipeline(folder, "policy_postprocessor", [unnormalize, to_device], statistics)


def _normalizer(settings: dict, inputs: dict) -> dict[str, Any]:
    features = {**inputs, **settings["output_features"]}
    return {"eps": 1e-8, "features": features, "norm_map": settings["normalization_mapping"]}


def _statistics(feature: str, affine: Affine, method: str) -> dict[str, torch.Tensor]:
    center, scale = torch.from_numpy(affine.center), torch.from_numpy(affine.scale)
    if method == "mean_std":
        return {f"{feature}.mean": center, f"{feature}.std": scale}
    return {f"{feature}.q01": center - scale, f"{feature}.q99": center + scale}


def _write_pipeline(
    folder: Path, name: str, steps: list[tuple[str, dict[str, Any]]], statistics: dict[str, torch.Tensor]
) -> None:
    entries = []
    for index, (registered, config) in enumerate(steps):
        entry: dict[str, Any] = {"class" if "." in registered else "registry_name": registered, "config": config}
        if statistics and registered.endswith("normalizer_processor"):
            entry["state_file"] = f"{name}_step_{index}_{registered}.safetensors"
            write_tensor_file(
                folder / entry["state_file"], {key: TensorSource.of(value) for key, value in statistics.items()}
            )
        entries.append(entry)
    write_text(folder / f"{name}.json", json.dumps({"name": name, "steps": entries}, indent=2) + "\n")
