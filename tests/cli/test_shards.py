import argparse

import pytest
from PIL import Image

from recap_ds.cli import shards
from recap_ds.data.manifest import Manifest
from recap_ds.errors import UsageError
from tests.data.shard_server import serve


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    shards.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["shards", *map(str, words)])
    return args.run(args)


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "shards"
    assert run("make", out, "--episodes", 2, "--chunk-size", 4, "--seed", 1) == 0
    return out


def test_make_writes_all_three_sources(folder, capsys):
    manifest = Manifest.load(folder)
    assert {source: counts.episodes for source, counts in manifest.counts.items()} == {
        "demo": 2,
        "auto": 3,
        "intervention": 1,
    }
    assert (manifest.td_horizon, manifest.action_width) == (4, 4)


def test_make_into_a_made_folder_is_refused(folder):
    with pytest.raises(UsageError, match="already in"):
        run("make", folder)


def test_verify_says_sound_or_names_the_fault(folder, capsys):
    assert run("verify", folder) == 0
    assert "sound" in capsys.readouterr().out
    shard = next(folder.glob("demo-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run("verify", folder) == 1
    captured = capsys.readouterr()
    assert captured.err.count(shard.name) == len(captured.err.splitlines()) > 0
    assert "faults" in captured.out


def test_index_rebuilds_what_was_lost(folder, capsys):
    before = Manifest.load(folder)
    for path in (*folder.glob("*.npz"), folder / "manifest.json"):
        path.unlink()
    assert run("index", folder) == 0
    assert Manifest.load(folder).shards == before.shards
    assert run("verify", folder) == 0


def test_show_prints_and_draws(folder, tmp_path, capsys):
    assert run("show", folder, "--out", tmp_path / "sheet.png") == 0
    text = capsys.readouterr().out
    assert "reach_red" in text and "human frames" in text
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
    with pytest.raises(UsageError, match="--out"):
        run("show", folder, "--out", tmp_path / "missing" / "sheet.png")


def test_remote_shards_are_shown_and_verified(folder, tmp_path, capsys):
    cache = ("--cache-folder", tmp_path / "cache")
    with serve(folder) as server:
        assert run("show", server.url, *cache) == 0
        assert capsys.readouterr().out.startswith(f"{server.url}: {Manifest.load(folder).num_samples} samples")
        assert run("verify", server.url, *cache, "--jobs", 1) == 0
        assert capsys.readouterr().out == f"{server.url}: sound\n"
        with pytest.raises(UsageError, match=r"--out .*: pictures are drawn of local shards only"):
            run("show", server.url, *cache, "--out", "x.png")


@pytest.mark.parametrize("words", [("make",), ("make", "x", "--episodes", "0"), ("verify", "x", "--jobs", "two"), ()])
def test_a_wrong_call_is_exit_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
