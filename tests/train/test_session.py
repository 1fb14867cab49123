"""Planning a run: what is checked before any process group exists, and that a refusal leaves nothing behind."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.data.label_records import LabelRecord, TaskLabels
from recap_ds.data.labels import LabelColumns, write_labels
from recap_ds.data.shard_set import ShardSet
from recap_ds.distributed.runtime import RankInfo
from recap_ds.envs.scripted import write_reach_shards
from recap_ds.errors import UsageError
from recap_ds.recipe import build_config
from recap_ds.train.session import Plan, label_scale, plan_session
from tests.distributed.harness import REPOSITORY
from tests.label.made_values import made_record, made_settings
from tests.tiny import tiny_config

ZERO3 = REPOSITORY / "ds_configs" / "zero3.json"


@pytest.fixture
def config_of(reach_shards, tmp_path):
    def made(**overrides):
        data = {"shards": reach_shards, "num_workers": 0, **overrides.pop("data", {})}
        model = {"max_prompt_tokens": 40, **overrides.pop("model", {})}
        settings = {"chunk_size": 10, "runs_dir": str(tmp_path / "runs"), **overrides}
        return tiny_config(**settings, data=data, model=model)

    return made


def plan_of(config, world: int = 1, rank: int = 0) -> Plan:
    info = RankInfo(rank=rank, local_rank=rank, world=world, local_world=world)
    return plan_session(config, ZERO3, info)


def test_a_plan_fits_the_data_and_writes_nothing(config_of, reach_shards, tmp_path):
    config = config_of(training={"batch_size": 2, "global_batch_size": 16})
    plan = plan_of(config, world=2)
    assert (plan.sizes.micro, plan.sizes.accumulation, plan.sizes.world) == (2, 4, 2)
    manifest = json.loads((Path(reach_shards) / "manifest.json").read_text())
    assert plan.tasks == list(manifest["tasks"]) == list(plan.contract.tasks)
    assert (plan.contract.state_dim, plan.contract.action_dim) == (manifest["state_dim"], manifest["action_dim"])
    assert plan.contract.cameras == tuple(manifest["cameras"]) and plan.contract.image_size == 32
    for name, task in manifest["tasks"].items():
        assert plan.contract.tasks[name].max_length == task["longest"]
        assert plan.contract.tasks[name].prompt == task["prompt"]
    assert not list(tmp_path.iterdir())


def test_every_rank_plans_the_same(config_of):
    config = config_of()
    first, second = plan_of(config, world=2), plan_of(config, world=2, rank=1)
    assert first.contract == second.contract and first.ds_config == second.ds_config
    slots = np.arange(6)
    assert first.dataset.batch(slots).actions.equal(second.dataset.batch(slots).actions)


def test_lengths_of_the_config_reach_the_contract(config_of):
    name = plan_of(config_of()).tasks[0]
    plan = plan_of(config_of(value={"max_length": {name: 77}}))
    assert plan.contract.tasks[name].max_length == 77


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"shards": None}}, r"data\.shards: name a folder"),
        ({"data": {"shards": "nowhere"}}, "nowhere"),
        ({"data": {"cameras": ["wrist"]}}, r"data\.cameras.*wrist"),
        ({"data": {"mixture": {"demo": 1.0, "auto": 1e-9}}}, "auto"),
        ({"max_action_dim": 1}, "max_action_dim"),
        ({"chunk_size": 11}, "chunk_size"),
        ({"training": {"global_batch_size": 12}}, r"training\.global_batch_size"),
        ({"value": {"max_length": {"fly": 3}}}, r"value\.max_length.*'fly'"),
        ({"model": {"max_prompt_tokens": 4}}, r"model\.max_prompt_tokens"),
        ({"model": {"vlm_model_name": "./no_such_model"}}, "no_such_model"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(config_of, tmp_path, change, said):
    with pytest.raises(UsageError, match=said) as error:
        plan_of(config_of(**change))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_run_of_other_settings_is_refused_before_anything_is_written(config_of, tmp_path):
    config = config_of()
    plan = plan_of(config)
    plan.run.start(config, plan.ds_config, plan.sizes.total, plan.contract.manifest_hash)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    plan_of(config)
    other = build_config({**config.model_dump(), "iql": {"expectile": 0.9}})
    with pytest.raises(UsageError, match=r"iql\.expectile"):
        plan_of(other)
    with pytest.raises(UsageError, match="the global batch"):
        plan_of(config, world=2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# -- stages -----------------------------------------------------------------------------------------------------

POLICY = {"training": {"stage": "policy"}}


@pytest.fixture(scope="module")
def labelled_shards(tmp_path_factory) -> str:
    """Shards with labels under the tag "ours", positive wherever the frame is odd; demos were not forced."""
    folder = tmp_path_factory.mktemp("labelled") / "shards"
    write_reach_shards(folder, num_demo=4, num_auto=4, num_intervention=3, size=32)
    shard_set = ShardSet.open(folder)
    odd = shard_set.table.frame % 2 == 1
    columns = LabelColumns(
        value=np.zeros(len(odd), np.float32),
        returns=np.zeros(len(odd), np.float32),
        advantage=np.where(odd, 0.25, np.nan).astype(np.float32),
        indicator=np.where(odd, INDICATOR_IDS["positive"], INDICATOR_IDS["none"]),
    )
    counts = {"num_samples": 1, "num_forced": 0, "num_known": 1, "num_positive": 1, "forced_fraction": 0.0}
    sigmas = dict(zip(shard_set.manifest.tasks, (0.5, None), strict=True))
    tasks = {task: TaskLabels(**counts, positive_fraction=1.0, threshold=0, sigma=s) for task, s in sigmas.items()}
    record = LabelRecord(
        values_tag="ours",
        values=made_record(shard_set),
        settings=made_settings(demos="labelled", corrections="labelled"),
        lookahead_frames=50,
        tasks=tasks,
        files={},
    )
    write_labels(shard_set, "ours", record, columns)
    return str(folder)


def test_a_policy_reads_the_labels_of_its_tag(config_of, labelled_shards):
    recap = {"demos": "labelled"}
    plan = plan_of(config_of(data={"shards": labelled_shards, "labels": "ours"}, recap=recap, **POLICY))
    batch = plan.dataset.batch(np.arange(16))
    table = plan.dataset.assembler.shard_set.table
    frames = table.frame[plan.dataset.order.samples(np.arange(16))[1]]
    assert batch.label_indicator.tolist() == [INDICATOR_IDS["positive"] if odd else 0 for odd in frames % 2]
    assert batch.label_advantage.tolist() == [0.25 * odd for odd in frames % 2]
    scale = label_scale(plan, torch.device("cpu"))
    assert scale.sigma.tolist() == [0.5, math.inf] and not scale.ready.any()
    assert plan.corrections == "labelled", "as the labels say"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"labels": "theirs"}}, r"no labels with the tag 'theirs'; there are ours"),
        ({"data": {"labels": "ours"}}, r"recap\.demos: positive here, labelled when the labels 'ours' were made"),
        (
            {
                "data": {"labels": "ours"},
                "recap": {"demos": "labelled"},
                "value": {"max_length": {"reach_red": 7}},
            },
            r"value\.max_length: task 'reach_red' is measured in 7 frames here",
        ),
    ],
)
def test_labels_of_something_else_are_refused(config_of, labelled_shards, tmp_path, change, said):
    change = {**change, "data": {"shards": labelled_shards, **change["data"]}}
    with pytest.raises(UsageError, match=said) as error:
        plan_of(config_of(**change, **POLICY))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_fine_tuning_and_critics_need_no_labels(config_of):
    for stage in ({**POLICY, "recap": {"sft": True}}, {"training": {"stage": "critic"}}):
        plan = plan_of(config_of(**stage))
        assert plan.dataset.assembler.labels is None
        assert label_scale(plan, torch.device("cpu")).sigma.tolist() == [math.inf] * 2
