"""Label jobs over a real critic: the same bytes on any number of ranks and after any interruption."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from recap_ds.batch import OUTCOME_IDS
from recap_ds.data import labels
from recap_ds.data.held_out import EvaluationBatches
from recap_ds.data.label_records import LABELS_NAME, VALUES_NAME
from recap_ds.data.labels import labels_folder, read_labels
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.values import read_values, values_folder
from recap_ds.distributed.runtime import RankInfo, Runtime
from recap_ds.errors import UsageError
from recap_ds.files.lock import exclusive
from recap_ds.files.records import FileRecord, record_file
from recap_ds.label.job import LabelJob, finished_labels, label_shards, open_label_job, rethreshold
from recap_ds.models.inference_value import predict_values
from tests.data.tiny_shards import flat_episode, mixed_set, write_tiny
from tests.distributed.harness import run_ranks
from tests.label.made_export import save_critic
from tests.label.made_values import store_values

ALONE = Runtime(RankInfo(), torch.device("cpu"), "gloo")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """shards/, and an export of each kind of critic, in a folder of its own."""
    folder = tmp_path_factory.mktemp("label_job")
    shard_set = mixed_set(folder / "shards")
    for critic in ("distributional", "iql"):
        save_critic(folder / critic, shard_set, critic)
    return folder


def run(
    root: Path, critic: str, tag: str, *overrides: str, shards: str = "shards", lines: list[str] | None = None
) -> LabelJob:
    job = open_label_job(root / critic, str(root / shards), tag, overrides)
    threads = torch.get_num_threads()
    label_shards(job, ALONE, [].append if lines is None else lines.append)
    torch.set_num_threads(threads)
    return job


def copy_of_shards(root: Path, name: str) -> Path:
    return shutil.copytree(root / "shards", root / name, ignore=shutil.ignore_patterns("values", "labels"))


def files_of(shards: Path, tag: str) -> dict[str, bytes]:
    folders = values_folder(shards, tag), labels_folder(shards, tag)
    return {f"{folder.parent.name}/{path.name}": path.read_bytes() for folder in folders for path in folder.iterdir()}


@pytest.fixture(scope="module")
def alone(root) -> dict[str, bytes]:
    run(root, "distributional", "alone")
    return files_of(root / "shards", "alone")


def check_same_bytes(mine: dict[str, bytes], other: dict[str, bytes]) -> None:
    assert {"values/values.json", "labels/labels.json", "labels/auto-000000.parquet"} <= mine.keys() == other.keys()
    assert [name for name in mine if mine[name] != other[name]] == []


def test_two_ranks_write_the_same_bytes_as_one(root, alone):
    shards = copy_of_shards(root, "two")
    results = run_ranks("label.label_worker", 2, str(root / "distributional"), str(shards), "alone")
    assert [result["has_record"] for result in results] == [True, False]
    num_shards = [len(result["lines"]) for result in results]
    assert min(num_shards) > 0 and sum(num_shards) == len(ShardSet.open(shards).manifest.shards)
    check_same_bytes(files_of(shards, "alone"), alone)


def test_a_killed_job_goes_on_to_the_same_bytes(root, alone):
    shards = copy_of_shards(root, "killed")
    with pytest.raises(AssertionError, match=rf"exit codes \[-{signal.SIGKILL.value}\]"):
        run_ranks("label.label_worker", 1, str(root / "distributional"), str(shards), "alone", "5")
    folder = values_folder(shards, "alone")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert len(before) == 5 and not labels_folder(shards, "alone").exists()
    lines = []
    run(root, "distributional", "alone", shards="killed", lines=lines)
    assert len(lines) == len(ShardSet.open(shards).manifest.shards) - 5
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    check_same_bytes(files_of(shards, "alone"), alone)


@pytest.mark.parametrize("critic", ["distributional", "iql"])
def test_values_are_the_critics_own(root, critic):
    job = run(root, critic, f"own-{critic}")
    stored = read_values(job.shard_set, f"own-{critic}")
    assert np.isfinite(stored.value).all() and stored.value.std() > 0
    assert (stored.action_advantage is not None) == (critic == "iql")
    # Another way through the data: held-out batches of another size, with their next observations.
    config = job.config.model_copy(
        update={
            "data": job.config.data.model_copy(update={"held_out_fraction": 0.5}),
            "evaluation": job.config.evaluation.model_copy(update={"batch_size": 7, "max_samples": 40}),
        }
    )
    batches = EvaluationBatches(job.assembler, config, rank=0, world=1)
    first = 0
    for batch in batches:
        predicted = predict_values(job.policy, batch.observation, batch.actions, batch.td_action_valid)
        valid = batch.sample_valid
        rows = batches.samples[first : first + int(valid.sum())]
        first += len(rows)
        np.testing.assert_allclose(stored.value[rows], predicted.value[valid].numpy(), atol=2e-6)
        if critic == "iql":
            wanted = torch.where(batch.td_valid, predicted.advantage, torch.nan)[valid].numpy()
            np.testing.assert_allclose(stored.action_advantage[rows], wanted, atol=2e-6)
    assert first == 40


def test_labels_of_remote_shards_are_made_on_a_copy(tmp_path):
    for make in (
        lambda: rethreshold("https://host/mine", "alone", "again", []),
        lambda: open_label_job(tmp_path, "s3://bucket/mine", "alone", []),
    ):
        with pytest.raises(UsageError, match=r"(https|s3)://.*: labels are written beside the shards.*a local copy"):
            make()


def test_rethreshold_needs_no_critic_and_equals_a_job_of_those_settings(root, alone):
    settings = ["recap.positive_fraction=0.2", "recap.demos=labelled", "label.lookahead=0.5s"]
    run(root, "distributional", "asked", *settings)
    record = rethreshold(root / "shards", "alone", "again", settings)
    assert record.lookahead_frames == 5 and record.values_tag == "alone"
    shard_set = ShardSet.open(root / "shards")
    (asked, first), (_, second) = (read_labels(shard_set, tag) for tag in ("asked", "again"))
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)
    assert asked.tasks == record.tasks and asked.files == record.files
    assert not values_folder(root / "shards", "again").exists()
    with pytest.raises(UsageError, match="--new-tag again: there are labels of that tag"):
        rethreshold(root / "shards", "alone", "again", [])
    with pytest.raises(UsageError, match=r"label\.batch_size: does not change labels"):
        rethreshold(root / "shards", "alone", "other", ["label.batch_size=3"])


def test_rethreshold_refuses_values_that_a_later_job_replaced(root, alone):
    shards = shutil.copytree(root / "shards", root / "stale")
    shutil.rmtree(values_folder(shards, "alone"))
    with pytest.raises(UsageError, match="no values with the tag 'alone'"):
        rethreshold(shards, "alone", "stale", [])
    shard_set = ShardSet.open(shards)
    store_values(shard_set, "alone", np.zeros(shard_set.num_samples, np.float32))
    with pytest.raises(UsageError, match="--tag alone: its labels were made of other values"):
        rethreshold(shards, "alone", "stale", [])
    with pytest.raises(UsageError, match=r"--tag '\.\./alone'"):
        rethreshold(root / "shards", "../alone", "stale", [])


def test_a_finished_job_is_recognised_and_another_refused(root, alone):
    def opened(critic: str, *overrides: str) -> LabelJob:
        return open_label_job(root / critic, str(root / "shards"), "alone", overrides)

    assert finished_labels(opened("distributional")).values_tag == "alone"
    with pytest.raises(UsageError, match=r"labels of other settings; .* rethreshold"):
        finished_labels(opened("distributional", "recap.positive_fraction=0.25"))
    with pytest.raises(UsageError, match="labels of other values"):
        finished_labels(opened("iql"))
    assert finished_labels(opened("distributional")._replace(tag="new")) is None
    shards = copy_of_shards(root, "other_values")
    shutil.copytree(values_folder(root / "shards", "alone"), values_folder(shards, "alone"))
    with pytest.raises(UsageError, match=r"--tag alone: .* another job \(checkpoint_hash differs\)"):
        run(root, "iql", "alone", shards="other_values")


@pytest.mark.parametrize(
    ("critic", "override", "said"),
    [
        ("distributional", "value.c_fail=3", r"value\.c_fail: is settled by the critic"),
        ("distributional", "data.cameras=[left]", r"data\.cameras: is settled by the critic"),
        ("distributional", "label.source=iql", "set distributional"),
        ("iql", "label.source=distributional", "set iql or blend"),
        ("distributional", "recap.positive_fraction=0.001", "too few samples"),
        ("distributional", "label.lookahead=soon", "neither frames"),
    ],
)
def test_wrong_settings_are_said_before_any_inference(root, critic, override, said):
    with pytest.raises(UsageError, match=said):
        open_label_job(root / critic, str(root / "shards"), "wrong", [override])
    assert not values_folder(root / "shards", "wrong").exists()


def test_samples_that_cannot_be_read_get_no_label_up_to_a_limit(root, tmp_path):
    shutil.copytree(root / "distributional", tmp_path / "distributional")
    shards = write_tiny(
        tmp_path / "shards", [flat_episode(i, 9, "auto", task=("cube", "cup")[i % 2]) for i in range(8)]
    )
    tar = tmp_path / "shards" / shards.manifest.shards[1].name
    data = bytearray(tar.read_bytes())
    start = int(shards.table.start[shards.shard_starts[1] + 2])
    data[start] ^= 255
    tar.write_bytes(data)
    with pytest.raises(UsageError, match=r"1 of 72 samples could not be read.*max_damaged_fraction=0\.001"):
        run(tmp_path, "distributional", "t")
    lines = []
    run(tmp_path, "distributional", "t", "data.max_damaged_fraction=0.05", lines=lines)
    assert any(line.startswith("1 samples could not be read") for line in lines)
    _, columns = read_labels(shards, "t")
    assert np.flatnonzero(np.isnan(columns.value)).tolist() == [shards.shard_starts[1] + 2]
    assert (shards.table.outcome == OUTCOME_IDS["success"]).all() and np.isfinite(columns.returns).all()


# -- run again ------------------------------------------------------------------------------------------------------


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_finished_job_that_is_whole_does_nothing_again(root, alone):
    folders = values_folder(root / "shards", "alone"), labels_folder(root / "shards", "alone")
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}
    lines = []
    run(root, "distributional", "alone", lines=lines)
    assert lines == [] and {path: path.stat().st_mtime_ns for path in before} == before


def test_what_was_lost_or_damaged_since_is_made_again(root, alone):
    """Values lost under finished labels, a bit of a value and of a label file, and the record of the values."""
    shards = shutil.copytree(root / "shards", root / "mended")
    values, labelled = values_folder(shards, "alone"), labels_folder(shards, "alone")

    def check(*said: str) -> None:
        lines = []
        run(root, "distributional", "alone", shards="mended", lines=lines)
        check_same_bytes(files_of(shards, "alone"), alone)
        assert [any(part in line for line in lines) for part in said] == [True] * len(said), lines
        assert sum(line.startswith("values  ") for line in lines) == "".join(said).count("values  ")

    (values / "demo-000001.parquet").unlink()
    with pytest.raises(UsageError, match=r"demo-000001\.parquet is missing; run launch/label\.py again with this tag"):
        rethreshold(shards, "alone", "less", ["recap.positive_fraction=0.1"])
    check("values  demo-000001.tar  1/1", "labels 'alone' were finished; 1 shards' values and all labels")
    rethreshold(shards, "alone", "less", ["recap.positive_fraction=0.1"])

    flip_bit(values / "auto-000000.parquet", 300)
    check("values  auto-000000.tar  1/1")
    flip_bit(labelled / "auto-000000.parquet", 300)
    check("labels  auto-000000.parquet was changed or damaged")
    (values / VALUES_NAME).unlink()
    check()
    (values / VALUES_NAME).unlink()
    (labelled / LABELS_NAME).unlink()
    check()


def test_a_job_killed_while_it_writes_labels_goes_on_to_the_same_bytes(root, alone, monkeypatch):
    """Nothing that calls itself finished may be there until all of it is."""
    shards = shutil.copytree(root / "shards", root / "half")
    flip_bit(labels_folder(shards, "alone") / "demo-000000.parquet", 300)
    written = []

    def dies(path: Path) -> FileRecord:
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return record_file(path)

    with monkeypatch.context() as patched:
        patched.setattr(labels, "record_file", dies)
        with pytest.raises(KeyboardInterrupt):
            run(root, "distributional", "alone", shards="half")
    with pytest.raises(UsageError, match="no labels with the tag 'alone'"):
        read_labels(ShardSet.open(shards), "alone")
    run(root, "distributional", "alone", shards="half")
    check_same_bytes(files_of(shards, "alone"), alone)


def test_a_shard_that_was_mended_gets_its_labels(root, alone):
    shards = copy_of_shards(root, "repaired")
    tar = shards / "auto-000001.tar"
    whole = tar.read_bytes()
    shard_set = ShardSet.open(shards)
    shard = [entry.name for entry in shard_set.manifest.shards].index(tar.name)
    lost = int(shard_set.shard_starts[shard]) + 2
    flip_bit(tar, int(shard_set.table.start[lost]))
    settings = ["data.max_damaged_fraction=0.05"]
    run(root, "distributional", "alone", *settings, shards="repaired")
    assert np.flatnonzero(np.isnan(read_labels(shard_set, "alone")[1].value)).tolist() == [lost]
    lines = []
    run(root, "distributional", "alone", *settings, shards="repaired", lines=lines)
    assert lines == []
    tar.write_bytes(whole)
    run(root, "distributional", "alone", *settings, shards="repaired", lines=lines)
    assert [line for line in lines if line.startswith("values")] == ["values  auto-000001.tar  1/1"]
    check_same_bytes(files_of(shards, "alone"), alone)


def test_two_jobs_on_one_tag_are_kept_apart(root, alone):
    shards = copy_of_shards(root, "locked")
    with exclusive(labels_folder(shards, "alone").with_name(".alone.lock"), "--tag alone", print):
        with pytest.raises(UsageError, match=rf"--tag alone: another process works on it \(host .*{os.getpid()}\)"):
            run(root, "distributional", "alone", shards="locked")
        assert not values_folder(shards, "alone").exists()
        run(root, "distributional", "other", shards="locked")
    lock = exclusive(labels_folder(shards, "new").with_name(".new.lock"), "--new-tag new", print)
    with lock, pytest.raises(UsageError, match="--new-tag new: another process works on it"):
        rethreshold(shards, "other", "new", [])
    rethreshold(shards, "other", "new", [])
