"""Simulators are extras: a package or a graphics library that is missing ends in one line that says what to install."""

import importlib
import os
from types import ModuleType

from recap_ds.errors import UsageError

GRAPHICS = "apt-get install libegl1 libgl1, or libosmesa6 with MUJOCO_GL=osmesa"


def import_simulator(module: str, name: str, install: str) -> ModuleType:
    """``install``: the command that brings it."""
    # Before mujoco is imported: a window, its own default, needs a screen.
    os.environ.setdefault("MUJOCO_GL", "egl")
    # pygame greets on standard output, which is where results are printed.
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # A shared library that the package needs is missing as well as the package: say which.
        raise UsageError(f"--env {name}: {module} cannot be imported ({error}); {install}") from None
    except (AttributeError, RuntimeError) as error:
        # What mujoco raises at import where MUJOCO_GL names a renderer without its library, or an unknown one.
        raise UsageError(
            f"--env {name}: MUJOCO_GL={os.environ['MUJOCO_GL']} cannot draw here ({error}); {GRAPHICS}"
        ) from None
