"""What a client may ask, checked: names and types here, what the contract says in ``RobotPolicy.request``."""

from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np

from recap_ds.errors import UsageError
from recap_ds.models.sampling import AdvantageName
from recap_ds.processing.contract import RobotContract

OPTIONS = {
    "advantage": (str, type(None)),
    "guidance_beta": (float, int),
    "seed": (int, type(None)),
    "single_action": (bool,),
    "reset": (bool,),
}


class Question(NamedTuple):
    """One message of a client."""

    observation: dict[str, Any]  # keys of the contract
    advantage: AdvantageName = "positive"
    guidance_beta: float = 1.0
    seed: int | None = None
    single_action: bool = False  # the next action of this client's chunk; a new chunk where that is used up
    reset: bool = False  # an episode begins: forget the chunk


def read_question(message: Any, contract: RobotContract) -> Question:
    """UsageError, for the client, where something has another name or type than ``README.md`` says."""
    if not isinstance(message, dict):
        raise UsageError(f"message: expected a map of observation and options, got {type(message).__name__}")
    images = [f"observation/{camera}" for camera in contract.cameras]
    known = [*images, "observation/state", "prompt", *OPTIONS]
    for key in message:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            raise UsageError(f"message: unknown key {str(key)[:60]!r}; {_hint(near, known)}")
    for key in (*images, "observation/state"):
        if key in message and not isinstance(message[key], np.ndarray):
            raise UsageError(f"{key}: expected an array, got {type(message[key]).__name__}")
    state = message.get("observation/state")
    if state is not None and state.dtype.kind != "f":
        raise UsageError(f"observation/state: expected float32 [{contract.state_dim}], got {state.dtype}")
    for key, types in OPTIONS.items():
        if key in message and type(message[key]) not in types:
            names = " or ".join("nil" if each is type(None) else each.__name__ for each in types)
            raise UsageError(f"{key}: expected {names}, got {type(message[key]).__name__}")
    options = {key: message[key] for key in OPTIONS if key in message}
    return Question({key: value for key, value in message.items() if key not in OPTIONS}, **options)


def _hint(near: list[str], known: list[str]) -> str:
    return f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
