"""Planning a run: what is checked before any process group exists, and that a refusal leaves nothing behind."""

import json
from pathlib import Path

import numpy as np
import pytest

from recap_ds.distributed.runtime import RankInfo
from recap_ds.errors import UsageError
from recap_ds.recipe import build_config
from recap_ds.train.session import Plan, plan_session
from tests.distributed.harness import REPOSITORY
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
