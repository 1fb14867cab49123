import argparse
import subprocess
import sys

import pytest

from recap_ds.cli import consolidate
from recap_ds.errors import RunFailed, UsageError
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import load_pretrained
from tests.checkpoint.hand_made import make_config, make_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny_lora"
    make_run(folder, PiStarRECAPPolicy(make_config("lora")))
    return folder


def call(*arguments):
    parser = argparse.ArgumentParser()
    consolidate.add_parser(parser.add_subparsers())
    args = parser.parse_args(["consolidate", *map(str, arguments)])
    return args.run(args)


def test_it_says_what_it_wrote(run_folder, tmp_path, capsys):
    assert call(run_folder, tmp_path / "export") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny_lora at step 5: ema weights in float32, adapter: separate"
    size = (tmp_path / "export/critic.safetensors").stat().st_size
    assert f"{size:>16,}  critic.safetensors" in lines
    assert lines[-1].startswith("wrote ") and lines[-1].endswith(f"files to {tmp_path / 'export'}")


def test_every_flag_arrives(run_folder, tmp_path, capsys):
    out = tmp_path / "export"
    flags = ["--weights", "raw", "--dtype", "bfloat16", "--merge", "--policy-only", "--shard-size", "1MB"]
    assert call(run_folder / "best", out, *flags) == 0
    assert call(run_folder / "latest", out, *flags, "--overwrite") == 0
    assert "raw weights in bfloat16, adapter: merged" in capsys.readouterr().out
    assert (out / "vlm/model.safetensors.index.json").is_file() and not (out / "critic.safetensors").exists()
    call(run_folder, tmp_path / "adapter", "--adapter-only")
    assert (tmp_path / "adapter/adapter/adapter_config.json").is_file()


@pytest.mark.parametrize("size", ["0", "-1GB", "nan", "5", "1KB", "1e3GB", "2000GB", "5 bananas"])
def test_a_shard_size_without_sense_is_refused(run_folder, tmp_path, size):
    with pytest.raises(UsageError, match=r"--shard-size .*: give a size such as 5GB or 512MiB"):
        call(run_folder, tmp_path / "export", f"--shard-size={size}")
    assert not (tmp_path / "export").exists()


def test_a_folder_that_cannot_be_written_is_one_line(run_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFailed, match="Not a directory"):
        call(run_folder, tmp_path / "file" / "export")


def test_deepspeed_is_not_needed(run_folder, tmp_path):
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from recap_ds.checkpoint.consolidate import consolidate\n"
        "from recap_ds.models.pretrained import load_pretrained\n"
        "consolidate(*sys.argv[1:]); print(load_pretrained(sys.argv[2]).contract.fps)"
    )
    command = [sys.executable, "-c", code, str(run_folder), str(tmp_path / "export")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["10.0"]
    assert load_pretrained(tmp_path / "export").policy.config.lora.enabled
