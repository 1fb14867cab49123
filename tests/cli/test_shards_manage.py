import argparse
import json

import pytest

from recap_ds.cli import shards
from recap_ds.errors import UsageError
from tests.data.made_episodes import made_episode, write
from tests.data.test_group_stats import tell_another_mean


def run(*words):
    parser = argparse.ArgumentParser()
    shards.add_parser(parser.add_subparsers())
    args = parser.parse_args(["shards", *map(str, words)])
    return args.run(args)


def test_split_and_merge_say_what_they_made(tmp_path, capsys):
    write(tmp_path / "all", [made_episode(0), made_episode(1, source="auto")])
    assert run("split", tmp_path / "all", tmp_path / "parts", "--by", "source") == 0
    parts = [tmp_path / "parts" / name for name in ("demo", "auto")]
    lines = [f"{part}: {part.name}, 7 samples in 1 shards" for part in parts]
    assert capsys.readouterr().out.splitlines() == lines
    assert run("merge", *parts, tmp_path / "out") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 14 samples in 2 shards\n"


def test_stats_are_printed_written_and_held_against_the_manifest(tmp_path, capsys):
    write(tmp_path, [made_episode(0)])
    assert run("stats", tmp_path, "--by", "task", "--out", tmp_path / "stats.json") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["sort", "state", "0", "7"]
    assert json.loads((tmp_path / "stats.json").read_text())["sort"]["action"]["count"] == [7]
    with pytest.raises(UsageError, match="--out"):
        run("stats", tmp_path, "--out", tmp_path / "missing" / "stats.json")
    tell_another_mean(tmp_path, "demo", "state")
    assert run("stats", tmp_path) == 1
    assert "its statistics of state in demo are not those of the samples; mend it with" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--by", "held-out"], ["--by", "task", "--held-out-fraction", "0.1"]])
def test_a_fraction_belongs_to_the_held_out_part(tmp_path, words):
    with pytest.raises(UsageError, match="belongs to --by held-out"):
        run("split", tmp_path, tmp_path / "out", *words)


@pytest.mark.parametrize("words", [("merge", "a"), ("split", "a", "b"), ("stats", "a", "--by", "robot")])
def test_a_wrong_call_is_exit_2(words):
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
