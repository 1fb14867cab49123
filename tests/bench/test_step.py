"""bench step: what it runs, what it makes of the seconds, and what it says to wrong input."""

import json
import sys

import pytest

from recap_ds.bench import step as bench
from recap_ds.bench.phases import PHASES
from recap_ds.bench.step_rank import in_turn
from recap_ds.cli.main import main
from recap_ds.errors import RunFailed
from recap_ds.models.backbones import check_vlm
from recap_ds.recipe import dump_config
from tests.distributed.harness import REPOSITORY, run_ranks

ZERO3 = str(REPOSITORY / "ds_configs" / "zero3.json")
SMALL = (
    "chunk_size=4",
    "model.image_size=32",
    "model.action_expert_hidden_size=32",
    "model.action_expert_num_layers=1",
    "model.flow_samples=1",
    "model.qv_hidden_size=32",
    "model.qv_num_layers=1",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.weight_decay=0.1",
)


def small_configurations(folder, *overrides):
    return bench.configurations(folder, None, [*bench.small_recipe(None, None), *SMALL, *overrides])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    for name, config in small_configurations(folder).items():
        (folder / f"{name}.yaml").write_text(dump_config(config))
    return run_ranks("bench.step_worker", 2, str(folder), ZERO3)


def test_engine_and_ddp_take_the_same_steps(two_ranks):
    for rank in two_ranks:
        assert rank["moved"] > 1e-5
        assert rank["engine_from_ddp"] < 0.02 * rank["moved"]
        assert rank["apart_from_ddp"] > 0.1 * rank["moved"]


def test_every_step_is_timed_by_phase(two_ranks):
    main_rank, other = two_ranks
    assert main_rank["contestants"] == ["engine", "joint_frozen", "policy_frozen", "ddp", "apart", "alone"]
    for name in ("engine", "ddp", "apart"):
        seconds, host_seconds, phases = main_rank["steps"][-1][name]
        assert set(phases) == set(PHASES)
        assert min(phases[each] for each in ("data", "forward", "backward", "optimizer", "shadows")) > 0
        assert sum(phases.values()) >= seconds
        assert host_seconds > 0
        assert (phases["communication"] > 0) == (name == "engine")
    # The other rank waits while rank 0 is alone.
    assert main_rank["alone"][0] > 0 and other["alone"] == [0.0, 0.0, {}]
    assert main_rank["facts"]["zero_stage"] == 3 and main_rank["facts"]["accumulation"] == 2


def test_what_is_compared_differs_in_nothing_else(tmp_path):
    configs = small_configurations(tmp_path)
    engine, joint, policy = (configs[name].model_dump() for name in (bench.ENGINE, bench.JOINT, bench.POLICY))
    assert (engine["training"]["stage"], joint["training"]["stage"], policy["training"]["stage"]) == (
        "joint",
        "joint",
        "policy",
    )
    assert engine["model"] | {"freeze_vlm": True} == joint["model"] == policy["model"]
    assert joint["training"] | {"stage": "policy"} == policy["training"]
    assert joint["data"] == policy["data"] == engine["data"]
    assert (tmp_path / "shards" / "manifest.json").is_file()


def test_the_joint_expert_fits_the_small_recipe(tmp_path):
    configs = bench.configurations(tmp_path, None, [*bench.small_recipe(None, "pi_joint"), "data.shards=mine"])
    for config in configs.values():
        check_vlm(config)
        assert (config.model.action_expert, config.is_told_in_words) == ("pi_joint", True)


def test_shards_of_the_user_are_taken(tmp_path):
    configs = small_configurations(tmp_path, "data.shards=mine", "training.stage=policy", "recap.sft=true")
    assert {config.data.shards for config in configs.values()} == {"mine"}
    assert configs[bench.ENGINE].training.stage == "joint"
    assert not (tmp_path / "shards").exists()


def test_ratios_are_medians_within_rounds():
    # The machine was ten times slower in the second round, for all alike.
    seconds = {
        "engine": ([2.0, 20.0, 2.0], [1.0, 5.0, 4.0]),
        "ddp": ([1.0, 10.0, 2.0], [1.0, 10.0, 2.0]),
        "apart": ([1.0, 5.0, 1.0], [1.0, 5.0, 1.0]),
        "alone": ([0.5, 5.0, 0.5], [0.0, 0.0, 0.0]),
        "joint_frozen": ([3.0, 30.0, 3.0], [3.0, 30.0, 3.0]),
        "policy_frozen": ([2.0, 20.0, 2.0], [2.0, 20.0, 2.0]),
    }
    watched = dict.fromkeys(PHASES, 0.0) | {"forward": 4.0, "other": 6.0}

    def steps_of(rank):
        """Every timed step is followed by a watched one, whose own time is nobody's business."""
        pairs = {
            name: [([each, each / 2, {}], [9 * each, each / 2, watched]) for each in of[rank]]
            for name, of in seconds.items()
        }
        return {name: [step for pair in each for step in pair] for name, each in pairs.items()}

    result = {"micro_batch": 8, "accumulation": 2, "taken": [steps_of(0), steps_of(1)]}
    figure = bench.figures(result, num_ranks=2, num_repeats=3)
    assert figure["step_seconds"]["engine"] == 4.0  # of the slower rank: 2, 20, 4
    assert figure["samples_per_second"] == {
        "engine": 8.0,
        "ddp": 16.0,
        "apart": 32.0,
        "alone": 32.0,
        "joint_frozen": 10.67,
        "policy_frozen": 16.0,
    }
    assert (figure["engine_over_ddp"], figure["engine_over_apart"], figure["ddp_over_apart"]) == (0.5, 0.25, 0.5)
    assert (figure["joint_over_policy_seconds"], figure["joint_over_policy_host"]) == (1.5, 1.5)
    assert (figure["host_seconds"]["engine"], figure["engine_over_ddp_host"]) == (2.0, 0.5)
    assert figure["phase_shares"]["ddp"]["forward"] == 0.4
    lines = bench.table(figure)
    assert len(lines) == 8 and lines[1].split()[:4] == ["engine", "4.0000", "2.0000", "8.00"]
    assert "engine 0.50 x DDP" in lines[-1]
    json.dumps(figure)


def test_turns_go_forwards_and_backwards():
    names = ["a", "b"]
    assert ["".join(in_turn(names, number)) for number in range(5)] == ["ab", "ab", "ba", "ba", "ab"]


def test_a_rank_that_fails_ends_the_others_and_says_why(tmp_path):
    code = "import os, sys, time; time.sleep(60) if os.environ['RANK'] == '0' else sys.exit('first\\nno memory left')"
    with pytest.raises(RunFailed, match="rank 1 of 2 failed: no memory left"):
        bench.run_ranks([sys.executable, "-c", code], tmp_path, 2)
    with pytest.raises(RunFailed, match="rank 0 of 1 failed: it said nothing"):
        bench.run_ranks([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ranks", "0"], "--ranks 0: give a count"),
        (["--repeats", "0"], "--repeats 0: give a count"),
        (["--config", "missing.yaml"], "--config missing.yaml: cannot be read"),
        (["--config", "some.yaml", "--expert", "pi_joint"], "--expert pi_joint: some.yaml has one of its own"),
        (["training.batch=3"], "batch_size"),
        (["--deepspeed", "missing.json"], "--deepspeed missing.json: No such file"),
        (["data.shards=missing"], "missing"),
    ],
)
def test_wrong_input_is_one_line(arguments, expected, capsys):
    given = ["bench", "step", "--deepspeed", ZERO3, *SMALL, *arguments]
    assert main(given) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and "\n" not in said
