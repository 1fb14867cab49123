"""A few seconds of ``python -m tests.serve.load``: good clients and every kind of hostile one at the same time."""

import pytest

pytest.importorskip("websockets", reason="pip install 'recap_ds[serve]'")
pytest.importorskip("msgpack", reason="pip install 'recap_ds[serve]'")

from tests.serve.load import run_load


def test_good_clients_get_right_answers_in_bad_company():
    figures = run_load(seconds=2.0, num_clients=18)
    assert figures["problems"] == []
    assert figures["answers"] > 0
    kinds = ("refusals", "oversized", "left", "half open", "wrong keys")
    assert all(figures[kind] > 0 for kind in kinds), figures
