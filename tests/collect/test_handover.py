"""What a killed collection left behind, found by the next one: written where it belongs, else out of the way."""

import json
import shutil

import numpy as np
import pytest

from recap_ds.collect import journal as journal_module
from recap_ds.collect.handover import take_over
from recap_ds.collect.job import AUTO, DEMO
from recap_ds.collect.journal import JOURNAL_NAME, SET_ASIDE_NAME, Label, open_journal
from recap_ds.collect.record import RECORD_NAME, CollectionRecord
from recap_ds.data.verify import verify_shards
from recap_ds.errors import RunFailed, UsageError
from recap_ds.rollout.episode import EpisodePlan, PlayedEpisode
from tests.collect.test_collect import read_shards, without_policy


def played(size=32, camera="top", state_dim=4, fill=0.5, num_frames=3):
    return PlayedEpisode(
        plan=EpisodePlan(0, 0, "reach_red", "told"),
        success=False,
        terminated=False,
        states=np.full((num_frames, state_dim), fill, np.float32),
        actions=np.zeros((num_frames, 2), np.float32),
        rewards=np.zeros(num_frames, np.float32),
        expert=np.zeros(num_frames, bool),
        pictures={camera: np.zeros((num_frames, size, size, 3), np.uint8)},
        num_rendered=num_frames,
    )


def leave(job, index=0, episode=None, kind=AUTO, prompt="move to the red target", fps=10.0):
    """An episode waits in the folder of ``job``, as after a kill."""
    label = Label(job.dataset(kind), index, kind.source, "reach_red", prompt, fps, "a test")
    with open_journal(job.out) as journal:
        CollectionRecord(job.out).set(label.dataset, job.provenance(kind))
        journal.add(episode or played(), label, job.provenance(kind))
    return job.out / JOURNAL_NAME / f"{label.dataset}-{index:06d}"


def hand_over(job):
    lines = []
    with open_journal(job.out) as journal:
        take_over(job, journal, CollectionRecord(job.out), lines.append)
        assert journal.names() == []
    return lines


def set_aside(job):
    return sorted(path.name for path in (job.out / SET_ASIDE_NAME).iterdir())


def test_it_becomes_shards_under_its_own_seed(tmp_path):
    leave(without_policy(tmp_path, {AUTO: 2}, name="old", seed=7))
    lines = hand_over(without_policy(tmp_path, {AUTO: 2}, name="new", seed=9))
    assert lines == ["1 episodes of old_auto in auto-000000.tar"] and verify_shards(tmp_path) == []
    assert read_shards(tmp_path)["old_auto", 0][0][0]["outcome"] == "truncated"
    assert json.loads((tmp_path / RECORD_NAME).read_text())["old_auto"]["seed"] == 7
    # The right command goes on with it, another one is told what differs.
    hand_over(without_policy(tmp_path, {AUTO: 2}, name="old", seed=7))
    with pytest.raises(UsageError, match=r"'old_auto' was collected with another seed \(7, now 8\); give a new one a"):
        hand_over(without_policy(tmp_path, {AUTO: 2}, name="old", seed=8))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"episode": played(size=48)}, "image_size is 48 there but 32 here"),
        ({"episode": played(camera="hand")}, "cameras is ('hand',) there but ('top',) here"),
        ({"episode": played(state_dim=39)}, "state_dim is 39 there but 4 here"),
        ({"fps": 80.0}, "fps is 80.0 there but 10.0 here"),
        ({"prompt": "go red"}, "task 'reach_red' has the prompt 'go red' there but 'move to the red target' here"),
    ],
)
def test_of_another_format_it_is_set_aside(tmp_path, given, said):
    left = without_policy(tmp_path, {AUTO: 2}, name="old")
    for index in (0, 1):
        leave(left, index, **given)
    job = without_policy(tmp_path, {AUTO: 1}, name="new")
    lines = hand_over(job)
    assert lines == [
        f"old_auto-000000 and 1 more of old_auto, left by an earlier collection: {said}; set aside in "
        f"{tmp_path / SET_ASIDE_NAME}"
    ]
    assert set_aside(job) == ["old_auto-000000", "old_auto-000001"] and not read_shards(tmp_path)
    # Nor does a record without episodes bind: with settings that fit, the name is free again.
    leave(left, 0, played(size=48))
    hand_over(job)
    assert set_aside(job)[:2] == ["old_auto-000000", "old_auto-000000.2"]
    leave(without_policy(tmp_path, {AUTO: 1}, name="old", seed=3))
    assert "episodes of old_auto in auto-" in hand_over(job)[0]


def test_of_other_settings_than_its_data_set_it_is_set_aside(tmp_path):
    job = without_policy(tmp_path, {AUTO: 2}, name="k")
    leave(job, 0)
    hand_over(job)
    path = leave(job, 1)
    record = json.loads((path / "episode.json").read_text())
    record["settings"]["env_settings"]["max_steps"] = 5
    (path / "episode.json").write_text(json.dumps(record))
    assert "'k_auto' is collected with another env.max_steps (5, now None); set aside" in hand_over(job)[0]


@pytest.mark.parametrize(
    "damage", ["arrays.npz", "top.npy", "episode.json", "gone", "older", "of another", "not finite"]
)
def test_what_is_damaged_is_set_aside_and_blocks_nobody(tmp_path, damage):
    job = without_policy(tmp_path, {AUTO: 2}, name="k")
    path, whole = leave(job, 0), leave(job, 1)
    if damage == "gone":
        (path / "top.npy").unlink()
    elif damage == "not finite":
        with np.load(path / "arrays.npz") as stored:
            np.savez(path / "arrays.npz", **{**stored, "states": np.full((3, 4), np.nan, np.float32)})
    elif damage == "of another":
        shutil.copy(whole / "episode.json", path / "episode.json")
    elif damage == "older":
        record = json.loads((path / "episode.json").read_text())
        del record["settings"]
        (path / "episode.json").write_text(json.dumps(record))
    else:
        data = (path / damage).read_bytes()
        (path / damage).write_bytes(data[: len(data) // 2])
    first, second = hand_over(job)
    assert first.startswith("k_auto-000000, left by an earlier collection: cannot be read (") and "\n" not in first
    assert second.startswith("1 episodes of k_auto in") and set_aside(job) == ["k_auto-000000"]


def test_an_interrupt_while_an_episode_is_written_costs_that_one_alone(tmp_path, monkeypatch):
    job = without_policy(tmp_path, {AUTO: 2}, name="k")
    leave(job, 0)

    def interrupted(path):
        raise KeyboardInterrupt

    with open_journal(tmp_path) as journal, monkeypatch.context() as patch:
        patch.setattr(journal_module, "sync_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.add(played(), Label("k_auto", 1, "auto", "reach_red", "told", 10.0, ""), job.provenance(AUTO))
        assert [path.name for path in (tmp_path / JOURNAL_NAME).glob("*.tmp")] == ["k_auto-000001.tmp"]
        assert [waiting.episode.name for waiting in journal.waiting()] == ["k_auto/000000"]


def test_an_episode_of_numbers_that_no_shard_holds_is_not_kept(tmp_path):
    job = without_policy(tmp_path, {AUTO: 1}, name="k")
    with pytest.raises(RunFailed, match=r"^a test: episode k_auto/000000, frame 0: state is not finite"):
        leave(job, 0, played(fill=np.nan))


@pytest.mark.parametrize("text", ['{"k_demo"', "[]", '{"k_demo": 3}', '{"k_demo": {"seed": 1}}', "\xff"])
def test_a_damaged_record_ends_in_one_line(tmp_path, text):
    tmp_path.joinpath(RECORD_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"collection.json: is damaged \(.*\); put a copy back, or move it away and"):
        hand_over(without_policy(tmp_path, {DEMO: 1}, name="k"))


def test_a_data_set_whose_record_is_lost_is_not_added_to(tmp_path):
    job = without_policy(tmp_path, {AUTO: 2}, name="k")
    leave(job, 0)
    (tmp_path / RECORD_NAME).unlink()
    # Those that wait bring it along.
    hand_over(job)
    assert json.loads((tmp_path / RECORD_NAME).read_text())["k_auto"]["seed"] == job.seed
    (tmp_path / RECORD_NAME).unlink()
    with pytest.raises(UsageError, match="does not say how data set 'k_auto', which is there, was collected; give a"):
        hand_over(job)
