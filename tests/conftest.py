"""Two workers run the suite (``-n 2`` in pyproject.toml), room by room: a room's files share what they launch.

``pytest -n 0 tests/...`` runs in this process, where a debugger can stop.
"""

import os
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Before torch is imported: two workers and the ranks they start share the cores already.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The rooms that start process groups come first, so that no worker is left with one of them at the end.
LONG_ROOMS = ("checkpoint", "train", "distributed", "cli", "label")


def room_of(nodeid: str) -> str:
    """``tests/data/test_index.py::test_x`` -> ``data``."""
    return nodeid.split("::")[0].removeprefix("tests/").split("/")[0]


class RoomScheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return room_of(nodeid)


# Not xdist's own groups: its 3.8 does not set them under pytest 9.2.
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RoomScheduling:
    return RoomScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {room: place for place, room in enumerate(LONG_ROOMS)}
    items.sort(key=lambda item: order.get(room_of(item.nodeid), len(order)))
