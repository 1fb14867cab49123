"""The robot's loop of README.md, run as it stands."""

import re
from pathlib import Path

import numpy as np

from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import save_pretrained
from recap_ds.processing.contract import TaskContract
from recap_ds.processing.normalize import Affine, Normalizer
from tests.made_export import CONTRACT
from tests.tiny import tiny_config, wake

README = Path(__file__).parents[1] / "README.md"


def robot_loop() -> str:
    section = README.read_text(encoding="utf-8").split("\n## Use a policy\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return block


def test_the_robots_loop_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    assert len(robot_loop().splitlines()) <= 50
    config = tiny_config()
    policy = PiStarRECAPPolicy(config)
    wake(policy)
    normalizer = Normalizer(
        "mean_std",
        state=Affine(np.zeros(4, np.float32), np.ones(4, np.float32), config.max_state_dim),
        actions=Affine(np.zeros(5, np.float32), np.ones(5, np.float32), config.max_action_dim),
    )
    contract = CONTRACT.model_copy(
        update={
            "fps": 10_000.0,
            "tasks": {"push": TaskContract(prompt="push", max_length=9)},
            "normalizer": normalizer.to_dict(),
        }
    )
    save_pretrained(policy, contract, tmp_path / "exports/mine")
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    exec(compile(robot_loop(), str(README), "exec"), variables)
    printed = np.fromstring(capsys.readouterr().out.replace("[", " ").replace("]", " "), sep=" ")
    assert printed.shape == (2 * 50 * 5,) and np.isfinite(printed).all() and np.unique(printed).size > 100
