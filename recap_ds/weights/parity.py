"""Does our pi0 / pi0.5 compute what another implementation did? Reference weights, inputs and outputs in one folder.

    model.safetensors   its weights, by the published names
    config.json         ``PiArchitecture``
    io.npz              image<i> [B, 3, P, P] in [-1, 1], image_mask<i> [B], tokens, token_mask [B, L], actions, noise,
                        x_t, loss (per element), sampled [B, H, A], time [B]; of pi0 also state [B, S]

All arithmetic is float32. B batch   C cameras   P image side   L prompt tokens   H chunk   A action dims   S state dims
"""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recap_ds.algo.flow_matching import noisy_action, target_velocity
from recap_ds.batch import Observation
from recap_ds.errors import UsageError
from recap_ds.models.building import Builder
from recap_ds.models.pi_joint import PiJointExpert
from recap_ds.models.sampling import sample_actions
from recap_ds.models.vlm import build_paligemma, encode_with_layers
from recap_ds.weights.architecture import PiArchitecture, check_architecture, read_json
from recap_ds.weights.names import load_pi_weights

WEIGHTS_NAME, CONFIG_NAME, IO_NAME = "model.safetensors", "config.json", "io.npz"


class Errors(NamedTuple):
    """Largest absolute differences."""

    velocity: float  # of |target - velocity|, which is what a loss per element tells of a velocity
    loss: float
    sampled: float


class Reference(NamedTuple):
    observation: Observation  # but for its images, which came normalised: ``pixels``
    pixels: Tensor  # [B, C, 3, P, P]
    actions: Tensor
    noise: Tensor
    time: Tensor
    x_t: Tensor
    loss: Tensor
    sampled: Tensor


@torch.no_grad()
def measure(folder: Path) -> Errors:
    """UsageError where the folder does not hold such a reference."""
    config = check_architecture(read_json(folder / CONFIG_NAME), folder / CONFIG_NAME)
    reference = _load_io(folder / IO_NAME, config)
    paligemma = build_paligemma(config.vlm_config(), Builder()).eval()
    expert = PiJointExpert(config.dimensions, config.max_state_dim, config.max_action_dim).eval()
    load_pi_weights(folder / WEIGHTS_NAME, paligemma, expert, Builder())

    prefix = encode_with_layers(paligemma, reference.observation, reference.pixels, checkpointing=False)
    actions, noise, time = reference.actions[:, None], reference.noise[:, None], reference.time[:, None]
    state, everywhere = reference.observation.state, torch.ones(actions.shape[0], config.chunk_size, dtype=torch.bool)
    x_t, indicator = noisy_action(actions, noise, time), torch.zeros_like(time, dtype=torch.long)
    velocity = expert(expert.encode_prefix(prefix), state, x_t, time, indicator, everywhere)
    deviation = (target_velocity(actions, noise) - velocity)[:, 0]
    dims = torch.ones(actions.shape[0], config.max_action_dim, dtype=torch.bool)
    steps = config.num_inference_steps
    sampled = sample_actions(expert, prefix, state, reference.noise, dims, None, 1.0, steps)
    _check_interpolant(x_t[:, 0], reference.x_t, folder)
    return Errors(
        _largest(deviation.abs() - reference.loss.sqrt()),
        _largest(deviation.square() - reference.loss),
        _largest(sampled - reference.sampled),
    )


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _check_interpolant(ours: Tensor, theirs: Tensor, folder: Path) -> None:
    if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
        raise UsageError(f"{folder / IO_NAME}: x_t is not time * noise + (1 - time) * actions")


def _load_io(path: Path, config: PiArchitecture) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    batch_size = len(arrays["time"]) if arrays.get("time", np.zeros(())).ndim else 0

    def take(name: str, *shape: int | None, integer: bool = False) -> Tensor:
        """``shape``: None = any size."""
        if name not in arrays:
            raise UsageError(f"{path}: has no '{name}'")
        array = arrays[name]
        if len(array.shape) != len(shape) or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
            expected = [n or "any" for n in shape]
            raise UsageError(f"{path}: '{name}' has shape {list(array.shape)}; config.json makes that {expected}")
        if array.dtype.kind not in "biuf" or (integer and array.dtype.kind == "f"):
            raise UsageError(f"{path}: '{name}' holds {array.dtype}, not {'whole ' if integer else ''}numbers")
        return torch.from_numpy(array.astype(np.int64 if integer else np.float32))

    side, cameras = config.vision.image_size, range(config.num_cameras)
    chunk = (batch_size, config.chunk_size, config.max_action_dim)
    time = take("time", batch_size)
    if not batch_size:
        raise UsageError(f"{path}: 'time' holds no samples")
    tokens = take("tokens", batch_size, None, integer=True)
    if not 0 <= tokens.min() <= tokens.max() < config.text.vocab_size:
        raise UsageError(f"{path}: 'tokens' go up to {tokens.max()}; config.json has {config.text.vocab_size} words")
    state = take("state", batch_size, config.max_state_dim) if config.type == "pi0" else torch.zeros(batch_size, 0)
    pixels = torch.stack([take(f"image{i}", batch_size, 3, side, side) for i in cameras], dim=1)
    observation = Observation(
        images=pixels,
        camera_mask=torch.stack([take(f"image_mask{i}", batch_size) for i in cameras], dim=1) > 0,
        tokens=tokens,
        token_mask=take("token_mask", batch_size, tokens.shape[1]) > 0,
        state=state,
    )
    names = ("x_t", "loss", "sampled")
    actions, noise = take("actions", *chunk), take("noise", *chunk)
    return Reference(observation, pixels, actions, noise, time, *(take(name, *chunk) for name in names))
