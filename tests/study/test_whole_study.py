"""A study with nothing faked, at toy size: collection, pre-training, critic, labels, policy, rollouts."""

import json

import yaml

from recap_ds.checkpoint.layout import best_or_latest
from recap_ds.cli.main import main
from tests.distributed.harness import REPOSITORY

TOY = {
    "max_action_dim": 4,
    "max_state_dim": 8,
    "chunk_size": 4,
    "num_inference_steps": 2,
    "model": {
        "vlm_model_name": "tiny",
        "image_size": 32,
        "max_prompt_tokens": 32,
        "action_expert_hidden_size": 16,
        "action_expert_num_layers": 1,
        "action_expert_num_heads": 2,
        "qv_hidden_size": 16,
        "qv_num_layers": 1,
        "qv_num_heads": 2,
    },
    "data": {"num_workers": 0},
    "logging": {"wandb": "disabled"},
    "training": {"batch_size": 4, "num_training_steps": 2, "num_warmup_steps": 1},
    "evaluation": {"max_samples": 8, "batch_size": 4},
}


def test_recap_from_the_collection_to_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").symlink_to(REPOSITORY / "ds_configs")
    for name, more in (("policy", {"recap": {"sft": True}}), ("critic", {"value": {"critic": "distributional"}})):
        values = TOY | more | {"training": {**TOY["training"], "stage": name}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    recipe = {
        "name": "toy",
        "env": "reach",
        "env_settings": ["env.image_size=32", "env.max_steps=12"],
        "data": {"episodes": 4, "corrections": 2, "demos": 2, "settings": ["collect.stall_frames=3", "chunk_size=4"]},
        "pretrain": {"recipe": "policy.yaml", "settings": ["model.freeze_vlm=false"]},
        "critic": {"recipe": "critic.yaml"},
        "critic_seed": 9,
        "label_settings": ["label.lookahead=4"],
        "policy": {"recipe": "policy.yaml"},
        "evaluation": {"episodes": 2, "settings": ["evaluation.num_videos=0", "evaluation.num_envs=1"]},
        "seeds": [3],
        "arms": {"recap": {"method": "recap", "guidance_betas": [1.0, 2.0]}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(recipe))
    code = main(["study", "--config", "study.yaml", "--programs", str(REPOSITORY / "launch")])
    said = capsys.readouterr()
    assert code == 0, said.err
    (unit,) = json.loads((tmp_path / "study.json").read_text())["units"]
    assert (unit["arm"], unit["seed"]) == ("recap", 3)
    assert [entry["guidance_beta"] for entry in unit["entries"]] == [1.0, 2.0]
    assert {task: len(told["num_frames"]) for task, told in unit["entries"][0]["tasks"].items()} == {
        "reach_red": 1,
        "reach_blue": 1,
    }
    assert set(unit["notes"]["labels"]) == {"reach_red", "reach_blue"}
    assert unit["notes"]["critic"].keys() == {"eval/loss"}, "the gate's figure"
    assert sum(line.startswith("| recap |") for line in said.out.splitlines()) == 2
    assert (tmp_path / "studies" / "toy" / "critic9" / "critic" / "summary.json").is_file()
    # Neither labels of another critic nor runs of another recipe are taken for what is asked.
    (tmp_path / "study.json").unlink()
    state = best_or_latest(tmp_path / "studies" / "toy" / "critic9" / "critic") / "state.json"
    whole = state.read_text()
    state.write_text(f"{whole} ")
    assert main(["study", "--config", "study.yaml", "--programs", str(REPOSITORY / "launch")]) == 2
    assert "data/values/critic9: was made of another critic than there is now; remove it" in capsys.readouterr().err
    state.write_text(whole)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(recipe | {"label_settings": ["label.lookahead=8"]}))
    assert main(["study", "--config", "study.yaml", "--programs", str(REPOSITORY / "launch")]) == 2
    assert "toy: holds runs of another recipe: critic.label.lookahead, label_settings.label" in capsys.readouterr().err
