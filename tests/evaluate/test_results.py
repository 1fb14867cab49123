"""An export judged on shards: the same figures however they are batched, and strict JSON."""

import json
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from recap_ds.algo.advantage import AdvantageScale
from recap_ds.batch import OUTCOME_IDS, TransitionBatch
from recap_ds.config import PiStarRECAPConfig
from recap_ds.data.assemble import Assembler
from recap_ds.data.baseline import mean_actions
from recap_ds.data.held_out import EvaluationBatches
from recap_ds.data.shard_set import ShardSet
from recap_ds.distributed.runtime import RankInfo, Runtime
from recap_ds.errors import UsageError
from recap_ds.evaluate.offline import summarise
from recap_ds.evaluate.records import Records, collect_records
from recap_ds.evaluate.results import evaluate_dataset, open_held_out, results_table, write_results
from recap_ds.models.losses import EvaluationOutput, normalizers
from recap_ds.models.pretrained import load_pretrained
from recap_ds.processing.contract import RobotContract, TaskContract
from recap_ds.processing.normalize import Normalizer
from recap_ds.processing.tokens import build_tokenizer
from tests.data.tiny_shards import flat_episode, mixed_set, write_tiny
from tests.made_export import save_made
from tests.tiny import tiny_config

ALONE = Runtime(RankInfo(), torch.device("cpu"), "gloo")
TOKENIZER = build_tokenizer("tiny")
MAX_SAMPLES = 14  # neither 3 nor 8 divides it


class Trained(NamedTuple):
    shards: ShardSet
    config: PiStarRECAPConfig
    contract: RobotContract
    export: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("results")
    shards = mixed_set(folder / "shards")
    config = tiny_config(
        max_action_dim=3,
        model={"max_prompt_tokens": 20, "image_size": 32},
        data={"held_out_fraction": 0.4},
        evaluation={"max_samples": MAX_SAMPLES, "num_flow_times": 2},
    )
    contract = save_made(folder / "export", shards, config)
    return Trained(shards, config, contract, str(folder / "export"))


def evaluate(trained: Trained, *overrides: str) -> dict[str, Any]:
    policy, contract, tokenizer = load_pretrained(trained.export, overrides)
    assembler, tasks = open_held_out(policy.config, contract, tokenizer, str(trained.shards.folder))
    return evaluate_dataset(policy, assembler, tasks, Normalizer.from_dict(contract.normalizer), ALONE)


@pytest.fixture(scope="module")
def evaluation(trained) -> dict[str, Any]:
    return evaluate(trained, "evaluation.batch_size=8")


def flat(values: Any, prefix: str = "") -> dict[str, float | None]:
    """Every number by its dotted name."""
    if isinstance(values, dict):
        parts = values.items()
    elif isinstance(values, list):
        parts = enumerate(values)
    else:
        return {prefix: values}
    return {name: number for key, part in parts for name, number in flat(part, f"{prefix}.{key}").items()}


def check_same_figures(mine: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = flat(mine), flat(other)
    assert first.keys() == second.keys() and any(name.endswith("shuffled_image_gap") for name in first)
    for name in first:
        wanted = None if second[name] is None else pytest.approx(second[name], rel=1e-3, abs=1e-6)
        assert first[name] == wanted, name


def test_figures_do_not_depend_on_the_batch_size(trained, evaluation):
    assert evaluation["num_samples"] == MAX_SAMPLES
    check_same_figures(evaluate(trained, "evaluation.batch_size=3"), evaluation)


def test_figures_do_not_depend_on_the_number_of_ranks(trained, evaluation):
    policy, contract, tokenizer = load_pretrained(trained.export, ["evaluation.batch_size=3"])
    assembler, tasks = open_held_out(policy.config, contract, tokenizer, str(trained.shards.folder))
    scale = AdvantageScale(*(torch.zeros(len(tasks)) for _ in range(3)))

    def forward(batch: TransitionBatch) -> EvaluationOutput:
        return policy(batch, "evaluate", scale, normalizers(torch.ones(4)), False)

    batches = [EvaluationBatches(assembler, policy.config, rank=rank, world=2) for rank in range(2)]
    assert len(batches[0]) == len(batches[1]) == 3, "the last rank's last batch is all padding or nearly"
    ranks = [collect_records(forward, part, ALONE.device) for part in batches]
    records = Records(*(np.concatenate(columns) for columns in zip(*ranks, strict=True)))
    data, normalizer = policy.config.data, Normalizer.from_dict(contract.normalizer)
    constant = mean_actions(assembler.shard_set, data.held_out_fraction, policy.config.training.seed)
    check_same_figures(summarise(records, policy.config, tasks, normalizer, constant), evaluation)


def test_an_evaluation_repeats_to_the_bit(trained, evaluation):
    assert evaluate(trained, "evaluation.batch_size=8") == evaluation


def test_the_file_has_the_agreed_keys_and_is_strict_json(evaluation, tmp_path):
    path = tmp_path / "evaluation_results.json"
    write_results(path, "exports/a", "data/b", evaluation)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    results = json.loads(path.read_text(), parse_constant=refuse)
    assert results.keys() == {"checkpoint", "dataset_path", "dataset_evaluation"}
    assert (results["checkpoint"], results["dataset_path"]) == ("exports/a", "data/b")
    agreed = {"total_loss", "v_loss", "q_loss", "policy_loss", "q_values", "v_values", "advantages", "num_samples"}
    assert agreed <= results["dataset_evaluation"].keys()
    assert results["dataset_evaluation"] == evaluation, "nothing here was NaN"


def test_nan_and_infinity_become_null(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, "a", "b", {"loss": float("nan"), "by_dim": [1.5, float("-inf")], "num_samples": 3})
    found = json.loads(path.read_text())["dataset_evaluation"]
    assert found == {"loss": None, "by_dim": [1.5, None], "num_samples": 3}


def test_the_table_has_a_line_per_group_and_task(trained, evaluation):
    lines = results_table(evaluation).splitlines()
    assert lines[0] == f"{MAX_SAMPLES} held-out samples"
    for group in evaluation["actions"]:
        assert sum(line.startswith(f"action error  {group} ") for line in lines) == 1
    for task in trained.contract.tasks:
        assert sum(line.startswith(f"value  {task} ") for line in lines) == 1


def test_returns_are_measured_in_the_contracts_lengths(trained):
    doubled = trained.contract.model_copy(
        update={
            "tasks": {
                name: task.model_copy(update={"max_length": 2 * task.max_length})
                for name, task in trained.contract.tasks.items()
            }
        }
    )
    returns = []
    for contract in (trained.contract, doubled):
        assembler, _ = open_held_out(trained.config, contract, TOKENIZER, str(trained.shards.folder))
        returns.append(first_batch(assembler, trained.config))
    success = returns[0].outcome == OUTCOME_IDS["success"]
    assert success.any()
    assert returns[1].mc_return[success].tolist() == pytest.approx((returns[0].mc_return[success] / 2).tolist())


def test_cameras_keep_the_slots_of_training(trained):
    turned = trained.contract.model_copy(update={"cameras": ("right", "left")})
    levels = []
    for contract in (trained.contract, turned):
        assembler, _ = open_held_out(trained.config, contract, TOKENIZER, str(trained.shards.folder))
        levels.append(first_batch(assembler, trained.config).observation.images.float().mean(dim=(2, 3, 4)))
    assert levels[0].shape[1] == 2 and not levels[0][:, 0].equal(levels[0][:, 1])
    assert levels[1].equal(levels[0].flip(1))


def first_batch(assembler: Assembler, config: PiStarRECAPConfig) -> TransitionBatch:
    return next(iter(EvaluationBatches(assembler, config, rank=0, world=1)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": {"cube": TaskContract(prompt="pick the cube", max_length=9)}}, "task 'cup'"),
        ({"action_dim": 3}, "action_dim is 2, the policy was trained on 3"),
        ({"state_dim": 2}, "state_dim is 3, the policy was trained on 2"),
        ({"cameras": ("left", "wrist")}, "no camera 'wrist'"),
    ],
)
def test_shards_of_another_robot_or_task_are_refused(trained, change, said):
    with pytest.raises(UsageError, match=said):
        open_held_out(trained.config, trained.contract.model_copy(update=change), TOKENIZER, str(trained.shards.folder))


def test_nothing_held_out_is_refused(trained):
    with pytest.raises(UsageError, match=r"data\.held_out_fraction"):
        evaluate(trained, "data.held_out_fraction=0.0")


def test_an_export_without_critics_is_refused(trained):
    policy, contract, tokenizer = load_pretrained(trained.export)
    del policy.critic, policy.target_critic
    assembler, tasks = open_held_out(policy.config, contract, tokenizer, str(trained.shards.folder))
    with pytest.raises(UsageError, match="without critics"):
        evaluate_dataset(policy, assembler, tasks, Normalizer.from_dict(contract.normalizer), ALONE)


def test_damaged_samples_are_left_out(trained, tmp_path):
    shards = write_tiny(tmp_path, [flat_episode(number, 9, task="cube") for number in range(8)])
    held_out = np.flatnonzero(shards.held_out(0.4))
    policy, contract, tokenizer = load_pretrained(trained.export, ["evaluation.max_samples=512"])
    normalizer = Normalizer.from_dict(contract.normalizer)

    def judge() -> dict[str, Any]:
        assembler, tasks = open_held_out(policy.config, contract, tokenizer, str(tmp_path))
        return evaluate_dataset(policy, assembler, tasks, normalizer, ALONE)

    assert judge()["num_samples"] == len(held_out)
    for tar in tmp_path.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    nothing = judge()
    assert nothing["num_samples"] == 0 and nothing["actions"] == {}
    assert nothing["policy_loss"] is None and nothing["total_loss"] is None, "no loss at all is not a loss of zero"
    write_results(tmp_path / "results.json", "a", "b", nothing)
    assert results_table(nothing).startswith("0 held-out samples")
