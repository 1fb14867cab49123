"""The server's packages are an extra: one that is missing ends in one line that says what to install."""

from importlib.util import find_spec

from recap_ds.errors import UsageError


def require_packages(program: str) -> None:
    """Call before any other module of this room is imported."""
    if missing := [name for name in ("websockets", "msgpack") if find_spec(name) is None]:
        raise UsageError(f"{program}: needs {' and '.join(missing)}; pip install -e '.[serve]' brings what it needs")
