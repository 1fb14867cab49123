"""``launch/train.py`` and ``launch/evaluate.py`` on wrong input: one line that says how to mend it, exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recap_ds.cli import evaluate, train
from recap_ds.cli.main import main as recap_ds
from recap_ds.envs.scripted import write_reach_shards
from tests.distributed.harness import LAUNCHER_VARIABLES, REPOSITORY
from tests.said import one_line

ZERO3 = str(REPOSITORY / "ds_configs" / "zero3.json")
QUICKSTART = REPOSITORY / "launch" / "recipes" / "quickstart.yaml"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "reach"
    write_reach_shards(folder, num_demo=4, num_auto=4, num_intervention=2)
    return folder


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.learning_rat=1"], "did you mean 'training.learning_rate'?"),
        (["training.batch_size=many"], "training.batch_size: input should be a valid integer"),
        (["training.batch_size"], "section.key=value"),
        (["data.shards=nowhere"], "nowhere/manifest.json: missing"),
        (["max_action_dim=1"], "max_action_dim"),
        (["data.cameras=[front]"], "front"),
        (["chunk_size=20"], "chunk_size"),
        (["training.global_batch_size=24"], "32 would be"),
        (["training.use_amp=maybe"], "training.use_amp"),
        (["training.betas=[1.5, 2]"], "training.betas"),
        (["data.mixture={demo: 1, auto: 0.0001}"], "auto"),
        (["value.max_length={fly: 3}"], "unknown task 'fly'"),
        (["model.max_prompt_tokens=4"], "model.max_prompt_tokens"),
        (["model.vlm_model_name=./nowhere", "model.conv_stem=false"], "./nowhere"),
    ],
)
def test_wrong_settings_end_in_one_line(overrides, said, shards, tmp_path, capsys):
    settings = [f"data.shards={shards}", f"runs_dir={tmp_path}", *overrides]
    assert train.main(["--deepspeed", ZERO3, "--config", str(QUICKSTART), *settings], QUICKSTART) == 2
    assert said in one_line(capsys)
    assert not list(tmp_path.iterdir()), "nothing is written before everything is checked"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gradient_clipping": 0.5}, "training.max_grad_norm"),
        ({"train_batch_size": 8}, "training.global_batch_size"),
        ({"optimizer": {"type": "AdamW"}}, "'optimizer'"),
        ({"zero_optimisation": {}}, "did you mean 'zero_optimization'?"),
        ({"bf16": {"enabled": True}}, "training.use_amp=false contradicts"),
    ],
)
def test_wrong_deepspeed_json_ends_in_one_line(change, said, shards, tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(json.loads(Path(ZERO3).read_text()) | change))
    settings = [f"data.shards={shards}", "training.use_amp=false"]
    assert train.main(["--deepspeed", str(path), "--config", str(QUICKSTART), *settings], QUICKSTART) == 2
    assert said in one_line(capsys)


def test_missing_files_and_flags_end_in_one_line(tmp_path, capsys):
    for arguments in (["--deepspeed", "no.json"], ["--deepspeed", ZERO3, "--config", "no.yaml"], ["--config", "x"], []):
        assert train.main([*arguments, f"data.shards={tmp_path}"], QUICKSTART) == 2
        one_line(capsys)


def test_a_missing_checkpoint_or_export_ends_in_one_line(tmp_path, shards, capsys):
    assert evaluate.main(["--checkpoint", str(tmp_path / "none"), "--shards", str(shards)]) == 2
    assert "none" in one_line(capsys)
    assert recap_ds(["consolidate", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "none" in one_line(capsys)
    assert recap_ds(["consolidate"]) == 2
    one_line(capsys)


def test_quickstart_shards_are_made_only_where_the_recipe_says(tmp_path, capsys):
    wanted = tmp_path / "mine"
    assert train.main(["--deepspeed", ZERO3, f"data.shards={wanted}"], QUICKSTART) == 2
    assert "mine/manifest.json: missing" in one_line(capsys)
    assert not wanted.exists()


def launch(command: list[str], folder: Path, timeout: float = 240.0) -> subprocess.CompletedProcess:
    """Run as a user would, in ``folder``, with no compiler on PATH."""
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    # The launcher's scripts start ``python``; nothing else may be needed.
    environment |= {"PATH": str(Path(sys.executable).parent), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


def test_the_launcher_shows_the_one_line_and_fails(tmp_path):
    arguments = ["--num_gpus", "2", str(REPOSITORY / "launch" / "train.py"), "--deepspeed", ZERO3, "training.lr=1"]
    done = launch([sys.executable, "-m", "deepspeed.launcher.runner", *arguments], tmp_path)
    assert done.returncode != 0
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line]
    assert len(errors) == 1 and "unknown key 'training.lr'" in errors[0]
    assert "Traceback" not in done.stderr


def test_the_quickstart_runs_finishes_and_reports_damage(tmp_path):
    command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--deepspeed", ZERO3]
    short = ["training.num_training_steps=12", "logging.every_steps=4", "evaluation.max_samples=16"]
    first = launch([*command, *short], tmp_path)
    assert first.returncode == 0, first.stderr
    run = tmp_path / "runs" / "quickstart"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 12 and summary["evaluation"]["eval/loss"] > 0
    assert (run / "checkpoints" / "latest").is_symlink()
    assert list((run / "wandb").glob("offline-run-*")), "wandb is offline where there is no account"

    again = launch([*command, *short, "evaluation.batch_size=7"], tmp_path)
    assert again.returncode == 0 and '"step": 12' in again.stdout
    assert "evaluation.batch_size changes nothing; launch/evaluate.py judges" in again.stderr
    assert "step  4/12" not in again.stderr + again.stdout, "a finished run is not trained again"

    for tar in (tmp_path / "data" / "quickstart").glob("*.tar"):
        data = bytearray(tar.read_bytes())
        for start in range(5000, len(data), 20_000):
            data[start : start + 400] = bytes(400)
        tar.write_bytes(data)
    damaged = launch([*command, *short, "name=damaged"], tmp_path)
    assert damaged.returncode == 2
    (line,) = [line for line in damaged.stderr.splitlines() if line.startswith("error: ")]
    assert "data.max_damaged_fraction" in line and "shards verify" in line
    assert (tmp_path / "runs" / "damaged" / "damaged.jsonl").stat().st_size > 0
