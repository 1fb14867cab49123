"""A desk on which studies run through fake programs."""

import json
from pathlib import Path

import pytest
import yaml

from recap_ds.cli.main import main
from recap_ds.study.programs import Crew
from tests.distributed.harness import REPOSITORY

PROGRAMS = Path(__file__).with_name("programs")
POLICY = {"max_action_dim": 2, "max_state_dim": 4, "model": {"vlm_model_name": "tiny"}, "training": {"stage": "policy"}}
CRITIC = {**POLICY, "value": {"critic": "distributional"}, "training": {"stage": "critic"}}


class Desk:
    """A working folder with a study's recipe; its data are there already, where ``collect`` is asked for them."""

    def __init__(self, folder):
        self.recipe, self.results = folder / "study.yaml", folder / "study.json"
        self.values = {
            "name": "toy",
            "env": "reach",
            "data": {"episodes": 4},
            "pretrain": {"recipe": "policy.yaml"},
            "critic": {"recipe": "critic.yaml"},
            "policy": {"recipe": "policy.yaml", "settings": ["training.weight_decay=0.2"]},
            "evaluation": {"episodes": 8},
            "seeds": [0, 1],
            "arms": {
                "plain": {"method": "imitation"},
                "guided": {"method": "imitation", "settings": ["data.auto_episodes=successful"], "seeds": [1]},
            },
        }
        self.values["arms"]["guided"]["guidance_betas"] = [1.0, 2.0]
        for name, values in (("policy", {**POLICY, "recap": {"sft": True}}), ("critic", CRITIC)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
        (folder / "ds_configs").symlink_to(REPOSITORY / "ds_configs")
        self.out = folder / "studies" / "toy"

    def words(self, *flags):
        self.recipe.write_text(yaml.safe_dump(self.values, sort_keys=False))
        return ["study", "--config", str(self.recipe), "--programs", str(PROGRAMS), *flags]

    def study(self, *flags):
        return main(self.words(*flags))

    def jobs(self):
        """What was started since the last look, by the run or the results it is of."""
        journal = Path("journal")
        lines = journal.read_text().splitlines() if journal.is_file() else []
        journal.unlink(missing_ok=True)
        return [_job(*json.loads(line)) for line in lines]


def _job(program, *arguments):
    if program == "evaluate":
        return f"evaluate {Path(arguments[arguments.index('--out') + 1]).parent.name}"
    settings = dict(word.split("=", 1) for word in arguments if "=" in word)
    return f"{settings['name']} {Path(settings['runs_dir']).name}"


@pytest.fixture
def verbs():
    """The words of every verb that was started."""
    return []


@pytest.fixture
def desk(tmp_path, monkeypatch, verbs):
    def verb(crew, what, log, *words):
        verbs.append(list(words))
        write_manifest(Path(words[words.index("--out") + 1]), f"{len(verbs)}: {what}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Crew, "verb", verb)
    return Desk(tmp_path)


def write_manifest(shards, text):
    shards.mkdir(parents=True)
    (shards / "manifest.json").write_text(text)
