"""A run's folder: when it may go on, and what it holds."""

import json

import pytest
import yaml

from recap_ds.errors import UsageError
from recap_ds.recipe import build_config, load_config
from recap_ds.train.run_folder import RunFolder
from tests.tiny import tiny_config

GLOBAL_BATCH, MANIFEST = 8, "a1b2"
DS_CONFIG = {"zero_optimization": {"stage": 3}}


@pytest.fixture
def start(tmp_path):
    """Start a run there with some settings, and the config with further ones."""

    def started(**overrides):
        settings = {"name": "run", "runs_dir": str(tmp_path)}
        config = tiny_config(**settings)
        RunFolder(config).start(config, DS_CONFIG, GLOBAL_BATCH, MANIFEST)
        return tiny_config(**settings, **overrides)

    return started


def check_run(config, global_batch=GLOBAL_BATCH, manifest=MANIFEST) -> None:
    RunFolder(config).check_continues(config, global_batch, manifest)


def test_a_new_folder_may_be_anything(tmp_path):
    check_run(tiny_config(runs_dir=str(tmp_path), training={"resume": "never"}))
    assert not list(tmp_path.iterdir()), "checking writes nothing"


def test_settings_that_a_finished_run_no_longer_asks_for_are_named(start):
    other = start(evaluation={"batch_size": 4, "gate": "mae"}, logging={"wandb": "disabled"})
    assert RunFolder(other).ignored_settings(other) == ["evaluation.batch_size", "evaluation.gate"]
    same = start()
    assert RunFolder(same).ignored_settings(same) == []


def test_the_same_settings_continue(start):
    check_run(start())


@pytest.mark.parametrize(
    "free",
    [
        {"training": {"batch_size": 2, "gradient_accumulation_steps": 4}},
        {"training": {"global_batch_size": 8}},
        {"training": {"activation_checkpointing": True, "max_skipped_steps": 3, "use_amp": True}},
        {"checkpoint": {"save_every_steps": 7, "keep_last": 1}},
        {"logging": {"wandb": "disabled", "every_steps": 1}},
        {"evaluation": {"every_steps": 3, "batch_size": 4}},
        {"data": {"shards": "moved/elsewhere", "num_workers": 7, "prefetch_batches": 9, "max_damaged_fraction": 0.5}},
    ],
)
def test_what_changes_no_training_is_free(start, free):
    check_run(start(**free))


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"training": {"learning_rate": 0.5}}, ["training.learning_rate"]),
        ({"training": {"seed": 1}, "iql": {"expectile": 0.9}}, ["iql.expectile", "training.seed"]),
        ({"data": {"held_out_fraction": 0.2}}, ["data.held_out_fraction"]),
        ({"data": {"mixture": {"demo": 1.0}}}, ["data.mixture"]),
        ({"training": {"num_training_steps": 40}}, ["training.num_training_steps"]),
        ({"chunk_size": 3}, ["chunk_size"]),
    ],
)
def test_other_settings_are_refused_by_their_names(start, change, keys):
    with pytest.raises(UsageError) as error:
        check_run(start(**change))
    assert f"other settings: {', '.join(keys)}; choose another name=" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_newer_than_the_run_had_its_default(start):
    config = start()
    path = RunFolder(config).path / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    del stored["recap"]["demos"]
    path.write_text(yaml.safe_dump(stored))
    check_run(config)
    with pytest.raises(UsageError, match=r"other settings: recap\.demos;"):
        check_run(build_config({**config.model_dump(), "recap": {"demos": "labelled"}}))


def test_another_global_batch_or_data_set_is_refused(start):
    config = start()
    with pytest.raises(UsageError, match=r"the global batch \(8 -> 16\)"):
        check_run(config, global_batch=16)
    with pytest.raises(UsageError, match=r"the shards \(another manifest\)"):
        check_run(config, manifest="c3d4")


def test_resume_never_refuses_a_folder_in_use(start):
    with pytest.raises(UsageError, match=r"training\.resume: never, but .*run holds a run"):
        check_run(start(training={"resume": "never"}))


def test_a_run_says_what_it_was_started_with(start, tmp_path):
    config = start()
    run = RunFolder(config)
    assert load_config(run.path / "config.yaml") == config
    assert json.loads((run.path / "ds_config.json").read_text()) == DS_CONFIG
    facts = json.loads((run.path / "run.json").read_text())
    assert facts["global_batch"] == GLOBAL_BATCH and facts["manifest_hash"] == MANIFEST
    assert {"recap_ds", "torch", "deepspeed", "transformers"} <= facts["versions"].keys()
    assert run.checkpoints.is_dir()
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "ds_config.json",
        "run.json",
    ]


def test_a_continuation_records_its_free_settings(start):
    config = start(logging={"every_steps": 3})
    RunFolder(config).start(config, DS_CONFIG, GLOBAL_BATCH, MANIFEST)
    stored = yaml.safe_load((RunFolder(config).path / "config.yaml").read_text())
    assert stored["logging"]["every_steps"] == 3


def test_a_folder_cut_off_before_the_run_was_recorded_is_free(start):
    config = start(iql={"expectile": 0.9})
    (RunFolder(config).path / "run.json").unlink()
    check_run(config)


def test_a_finished_run_has_a_summary(start):
    run = RunFolder(start())
    assert run.finished_summary() is None
    run.finish({"step": 20, "evaluation": {"eval/loss": None}})
    assert run.finished_summary() == {"step": 20, "evaluation": {"eval/loss": None}}


def test_forgetting_drops_later_and_torn_lines(start):
    run = RunFolder(start())
    run.forget_after(3)
    assert not run.metrics.exists(), "nothing to forget"
    written = [json.dumps({"step": step, "train/loss": 0.5}) for step in (1, 2, 3, 3, 4, 5)]
    run.metrics.write_text("\n".join(written) + '\n{"step": 2, "train/lo')
    run.forget_after(3)
    assert run.metrics.read_text() == "\n".join(written[:4]) + "\n"
    run.forget_after(0)
    assert run.metrics.read_text() == ""


def test_other_labels_under_the_same_tag_are_named(tmp_path):
    config = tiny_config(name="run", runs_dir=str(tmp_path))
    run = RunFolder(config)
    run.start(config, DS_CONFIG, GLOBAL_BATCH, MANIFEST, labels_hash="c3d4")
    run.check_continues(config, GLOBAL_BATCH, MANIFEST, labels_hash="c3d4")
    with pytest.raises(UsageError, match="other settings: the labels"):
        run.check_continues(config, GLOBAL_BATCH, MANIFEST, labels_hash="e5f6")


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    config = tiny_config(name="run", runs_dir=str(tmp_path))
    first, second = RunFolder(config), RunFolder(config)
    first.lock()
    with pytest.raises(UsageError, match="another process trains in this folder"):
        second.lock()
    first.unlock()
    second.lock()


@pytest.mark.parametrize("name", ["run.json", "summary.json"])
def test_damaged_run_files_are_named(start, tmp_path, name):
    config = start()
    (tmp_path / "run" / name).write_text("{ not json")
    with pytest.raises(UsageError, match=rf"{name}: cannot be read"):
        check_run(config)
        RunFolder(config).finished_summary()


def test_a_damaged_line_of_metrics_is_dropped(start, tmp_path):
    run = RunFolder(start())
    lines = ['{"step": 1, "a": 1}\n', "garbage\n", "[]\n", '{"step": 2}\n', '{"step": 3}\n', '{"step": 2']
    run.metrics.write_text("".join(lines))
    run.forget_after(2)
    assert run.metrics.read_text() == lines[0] + lines[3]
