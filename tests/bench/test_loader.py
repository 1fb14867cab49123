"""bench loader: that it measures what it says. Its seconds are this machine's and are not judged."""

import json
import tempfile

import pytest

from recap_ds.bench import loader as bench
from recap_ds.cli.main import main
from recap_ds.data.shard_set import ShardSet
from tests.data.tiny_shards import flat_episode, tiny_config, write_tiny


def test_it_prints_a_table_and_one_line_of_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(bench, "EPISODES", {"demo": 8, "auto": 4, "intervention": 1})
    flags = ("--image-size", "16", "--batch", "4", "--workers", "1", "--batches", "2", "--repeats", "1")
    assert main(["bench", "loader", *flags, "--index-samples", "300K"]) == 0
    said = capsys.readouterr()
    (line,) = said.out.splitlines()
    figures = json.loads(line)
    assert figures["bench"] == "loader" and (figures["cameras"], figures["image_size"]) == (2, 16)
    assert min(*figures["samples_per_second"].values(), *figures["first_batch_seconds"].values()) > 0
    # Some 90 bytes a sample, none of them copied to the worker.
    assert 20 < figures["index_node_mib"] < 30 and figures["index_worker_private_mib"] < 10
    assert 0 < figures["node_epoch_bytes"]["lanes_4"] <= figures["set_bytes"]
    assert "samples/s" in said.err and len(said.err.splitlines()) == 7
    assert not list(tmp_path.rglob("*.arrays")) and not list(tmp_path.glob("recap_ds_bench_*"))


def test_a_node_reads_the_shards_of_its_lane_only(tmp_path):
    write_tiny(tmp_path, [flat_episode(number, 8) for number in range(32)], samples_per_shard=16)
    shard_set, data = ShardSet.open(tmp_path), tiny_config().data
    whole = sum(entry.bytes for entry in shard_set.manifest.shards)
    assert bench.fetched_bytes(shard_set, data, 8, lanes=1) > 0.9 * whole
    assert bench.fetched_bytes(shard_set, data, 8, lanes=4) == whole / 4


@pytest.mark.parametrize("flag, value", [("--workers", "0"), ("--batch", "many"), ("--index-samples", "5")])
def test_counts_without_sense_end_in_one_line(flag, value, capsys):
    assert main(["bench", "loader", flag, value]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{flag} {value}: give a count" in line


def test_shards_that_are_not_there_end_in_one_line(tmp_path, capsys):
    assert main(["bench", "loader", "--shards", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "manifest.json: missing" in line
