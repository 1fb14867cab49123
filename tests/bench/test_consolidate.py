"""The bench of exports, small: what it writes is what DeepSpeed reads, and it says so if an export were wrong."""

import json

import pytest
from safetensors.torch import load_file, save_file

from recap_ds.bench import consolidate as bench
from recap_ds.bench.made_state import make_state
from recap_ds.cli.main import main, run
from recap_ds.errors import RunFailed, UsageError


def test_it_prints_one_line_with_both_ways_beside_each_other(tmp_path, capsys):
    command = ["bench", "consolidate", "--parameters", "1.2M", "--shard-size", "5MB", "--folder", str(tmp_path)]
    assert main(command) == 0
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert figures["equal"] is True and figures["within_bound"] is True
    assert figures["parameters"] >= 1.2e6 and figures["num_files"] >= 4
    for way in ("ours", "ours_from_deepspeed_folder", "zero_to_fp32"):
        assert figures[way]["peak_mib"] > 50 and figures[way]["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_another_value_another_name_and_another_shape_are_found(tmp_path):
    state = make_state(tmp_path / "state", 10**6)
    bench.consolidate(state.run, tmp_path / "raw", weights="raw")
    bench.zero_to_fp32(str(state.native), str(tmp_path / "theirs"), 10**8)
    assert bench.same_tensors(tmp_path / "raw", tmp_path / "theirs")
    bench.consolidate(state.run, tmp_path / "ema", weights="ema")
    assert not bench.same_tensors(tmp_path / "ema", tmp_path / "theirs")
    file = tmp_path / "raw/critic.safetensors"
    whole = load_file(file)
    name = next(name for name in sorted(whole) if whole[name].dim() == 2)
    for changed in ({name: whole[name] + 1e-3}, {name: whole[name].flatten()}, {"more": whole[name].clone()}):
        save_file({**whole, **changed}, file)
        assert not bench.same_tensors(tmp_path / "raw", tmp_path / "theirs")


def test_too_little_room_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match=rf"--folder {tmp_path}: .* GB are free and 4000.0 GB are needed"):
        bench.bench_consolidate(10**11, 10**9, tmp_path)
    with pytest.raises(UsageError, match=r"--folder .*none: there is no such folder"):
        bench.bench_consolidate(10**6, 10**9, tmp_path / "none")


@pytest.mark.parametrize("count", ["0", "many", "-3M", "nan", "1e9", "5T", "1000B"])
def test_a_count_without_sense_is_refused(count):
    with pytest.raises(UsageError, match=r"--parameters .*: give a count such as 300M or 1\.5B"):
        run(["bench", "consolidate", f"--parameters={count}"])


def test_a_child_that_fails_is_one_line(tmp_path):
    missing = {"checkpoint": str(tmp_path), "out": str(tmp_path / "out")}
    with pytest.raises(
        RunFailed, match=r"bench: recap_ds\.checkpoint\.consolidate:consolidate failed: .*no checkpoint"
    ):
        bench.measure(bench.consolidate, missing, missing)
