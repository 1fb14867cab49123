"""``recap-ds bench sample``: that it measures what it says. Its seconds are this machine's and are not judged."""

import json

import pytest

from recap_ds.cli.main import main

pytest.importorskip("websockets", reason="pip install 'recap_ds[serve]'")
pytest.importorskip("msgpack", reason="pip install 'recap_ds[serve]'")

SMALL = "--shrink 8 --layers 1 --cameras 1 --chunk-size 4 --steps 2 --repeats 1 --clients 1,3 --requests 2 --device cpu"


@pytest.mark.parametrize("expert", ["dit_cross", "pi_joint"])
def test_it_prints_one_line_of_json(expert, capsys):
    assert main(["bench", "sample", "--expert", expert, *SMALL.split()]) == 0
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert (figures["bench"], figures["expert"], figures["dtype"]) == ("sample", expert, "float32")
    ways = {"cached", "guided", "recomputed"} | ({"projected"} if expert == "dit_cross" else set())
    assert figures["seconds"].keys() == ways and figures["over_cached"].keys() == ways - {"cached"}
    assert figures["seconds_of_parts"].keys() == {"prefix", "step"}
    for each in (*figures["seconds"].values(), *figures["over_cached"].values(), *figures["seconds_of_parts"].values()):
        assert each.keys() == {"wall", "host"} and each["wall"] > 0 and each["host"] > 0
    # One round: its ratio is that of its seconds, which are rounded.
    seconds = figures["seconds"]["recomputed"]["wall"] / figures["seconds"]["cached"]["wall"]
    assert figures["over_cached"]["recomputed"]["wall"] == pytest.approx(seconds, rel=0.02)
    for rows in (figures["clients"]["unguided"], figures["clients"]["guided"]):
        assert [(row["clients"], row["requests"]) for row in rows] == [(1, 2), (3, 6)]
        assert all(0 < row["p50_seconds"] <= row["p95_seconds"] for row in rows)
        assert rows[0]["mean_batch"] == 1
    assert f"{expert}, 3 M parameters, float32 on cpu" in said.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shrink", "3"], "--shrink 3: give 1, 2, 4 or 8"),
        (["--clients", "1,x"], "--clients x: give a count"),
        (["--steps", "0"], "--steps 0: give a count"),
        (["--expert", "other"], "invalid choice"),
    ],
)
def test_wrong_flags_are_one_line(flags, said, capsys):
    assert main(["bench", "sample", *SMALL.split(), *flags]) == 2
    assert said in capsys.readouterr().err
