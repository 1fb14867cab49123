"""recap_ds: RECAP (advantage-conditioned VLA training) on DeepSpeed ZeRO-3.

Importing this package is light on purpose: torch and transformers come in only when a public name
is first used.
"""

__version__ = "0.1.0"

_PUBLIC = {
    "PiStarRECAPConfig": "recap_ds.config",
    "PiStarRECAPPolicy": "recap_ds.models.policy",
}
__all__ = ["PiStarRECAPConfig", "PiStarRECAPPolicy", "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'recap_ds' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
