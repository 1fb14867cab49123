import pickle

import numpy as np
import pytest

from recap_ds.data.manifest import Manifest
from recap_ds.data.verify import verify_shards
from recap_ds.envs.reach import MAX_STEPS, PROMPTS, TASKS, is_success, move, render
from recap_ds.envs.scripted import scripted_episodes, write_reach_shards


@pytest.fixture(scope="module")
def episodes():
    return {kind: list(scripted_episodes(kind, 60, seed=0)) for kind in ("demo", "auto", "intervention")}


def test_every_episode_is_what_the_environment_would_have_done(episodes):
    for kind, made in episodes.items():
        for episode in made:
            position, velocity = episode.read_frames.scene.start, np.zeros(2)
            for state, action in zip(episode.states, episode.actions, strict=True):
                assert not is_success(position, episode.read_frames.scene)
                np.testing.assert_allclose(state, [*position, *velocity], atol=1e-5)
                position, velocity = move(position, action)
            success = is_success(position, episode.read_frames.scene)
            assert episode.outcome == ("success" if success else "failure"), (kind, episode.name)
            assert success or episode.num_frames == MAX_STEPS


def test_demonstrations_and_corrections_succeed_and_the_policy_is_middling(episodes):
    rate = {kind: np.mean([e.outcome == "success" for e in made]) for kind, made in episodes.items()}
    assert rate["demo"] == rate["intervention"] == 1.0
    assert 0.4 <= rate["auto"] <= 0.7
    length = {kind: np.mean([e.num_frames for e in made]) for kind, made in episodes.items()}
    assert length["demo"] < length["auto"]
    assert max(e.num_frames for made in episodes.values() for e in made) <= 40


def test_a_person_takes_over_once_and_keeps_control(episodes):
    for episode in episodes["intervention"]:
        assert not episode.human[0] and episode.human[-1]
        assert (np.diff(episode.human.astype(int)) >= 0).all()
    assert all(episode.human is None for kind in ("demo", "auto") for episode in episodes[kind])


def test_tasks_are_balanced_and_named_in_the_prompt(episodes):
    for made in episodes.values():
        assert {task: sum(e.task == task for e in made) for task in TASKS} == {"reach_red": 30, "reach_blue": 30}
        assert all(e.prompt == PROMPTS[e.task] for e in made)


def test_an_episode_depends_on_kind_seed_and_number_only(episodes):
    few = list(scripted_episodes("auto", 5, seed=0))
    for a, b in zip(few, episodes["auto"], strict=False):
        np.testing.assert_array_equal(a.actions, b.actions)
    other = next(scripted_episodes("auto", 1, seed=1))
    assert not np.array_equal(other.states[0], few[0].states[0])


def test_pictures_are_rendered_on_demand_and_travel_to_workers(episodes):
    reader = pickle.loads(pickle.dumps(episodes["auto"][0].read_frames))
    pictures = reader([4, 0])
    assert pictures["top"].shape == (2, 64, 64, 3)
    expected = render(episodes["auto"][0].states[4, :2].astype(np.float64), reader.scene, "top", 64)
    np.testing.assert_array_equal(pictures["top"][0], expected)


def test_the_folder_is_sound_and_tagged(tmp_path):
    manifest = write_reach_shards(tmp_path, num_demo=3, num_auto=3, num_intervention=2, chunk_size=6)
    assert manifest == Manifest.load(tmp_path)
    assert (manifest.action_width, manifest.td_horizon, manifest.state_dim, manifest.action_dim) == (6, 6, 4, 2)
    assert list(manifest.counts) == ["demo", "auto", "intervention"]
    assert manifest.counts["auto"].episodes == 5 and manifest.counts["intervention"].episodes == 2
    assert set(manifest.tasks) == set(TASKS)
    assert verify_shards(tmp_path) == []
