"""A person corrects during collection: the same shards as of scripted corrections, and a clean end."""

import json
import multiprocessing

import numpy as np
import pytest
import torch

from recap_ds.cli.main import main
from recap_ds.collect import job as job_module
from recap_ds.collect.job import AUTO, DEMO, INTERVENTION, open_collection
from recap_ds.collect.record import RECORD_NAME
from recap_ds.collect.run import collect
from recap_ds.data.verify import verify_shards
from recap_ds.envs.build import open_environment
from recap_ds.errors import UsageError
from recap_ds.recipe import load_config
from recap_ds.rollout import keyboard, workers
from recap_ds.rollout.keyboard import KeyboardCorrector
from tests.collect.test_collect import BASE, read_shards
from tests.rollout.fake_window import NOTHING, FakeWindow, hold, tap

# Two episodes of six frames: taken over at frame 2, handed back at 4; acted in throughout. The third one is left.
TICKS = [NOTHING, NOTHING, tap("t"), hold("up"), hold("right"), tap("t"), NOTHING]
TICKS += [tap("t"), *[hold("left")] * 6]
SLOW = ["env.max_steps=6", "collect.expert_speed=0.1", "collect.expert_noise=0.0", "collect.expert_bias=0.0"]


def use_window(monkeypatch, *ticks):
    """Forked processes have what is put in place here; spawned ones would not."""
    monkeypatch.setattr(job_module, "check_display", lambda: None)
    monkeypatch.setattr(workers, "get_context", lambda _: multiprocessing.get_context("fork"))
    monkeypatch.setattr(workers, "_open_corrector", lambda env, _: KeyboardCorrector(env, FakeWindow(*ticks)))


def with_keyboard(out, goals, *overrides, **options):
    config = load_config(None, [*BASE, *SLOW, *overrides])
    return open_collection(out, "reach", goals, config, seed=7, corrector="keyboard", **options)


def test_corrections_of_a_person_are_recorded_and_leaving_keeps_them(tmp_path, monkeypatch):
    use_window(monkeypatch, *TICKS, NOTHING, tap("escape"))
    lines = []
    job = with_keyboard(tmp_path / "k", {INTERVENTION: 3})
    tallies = collect(job, torch.device("cpu"), 1, lines.append)
    assert verify_shards(job.out) == []
    tally = tallies["k_intervention"]
    assert (tally.num_episodes, tally.num_successes, tally.num_takeovers) == (2, 0, 2)
    assert (tally.num_human_frames, tally.num_frames) == (8, 12)
    assert lines[0] == "the window was closed; the same command goes on with the episodes that are missing"
    episodes = read_shards(job.out)
    world = open_environment("reach", job.config.env)
    human = {0: [False, False, True, True, False, False], 1: [True] * 6}
    for (_, index), frames in episodes.items():
        records = [frames[frame][0] for frame in range(6)]
        assert [record["control"] == "human" for record in records] == human[index]
        assert [record["source"] == "intervention" for record in records] == human[index]
        assert {record["outcome"] for record in records} == {"truncated"}
        assert records[0]["origin"].endswith("by a mediocre expert, corrected at the keyboard")
        world.reset(7 + 1_000_000 + index, records[0]["task"])
        for frame in range(6):
            np.testing.assert_array_equal(world.state(), frames[frame][1]["state"])
            world.step(frames[frame][1]["actions"][0])
    first = [episodes["k_intervention", 0][frame] for frame in range(6)]
    np.testing.assert_allclose([arrays["actions"][0] for _, arrays, _ in first[2:4]], [[0, 0.5], [0.5, 0]])
    # No chunk of the policy's reaches into what the person did.
    assert [record["num_valid"] for record, _, _ in first] == [2, 1, 2, 1, 2, 1]
    record = json.loads((job.out / RECORD_NAME).read_text())["k_intervention"]
    assert record["corrector"] == "keyboard" and "stall_frames" not in record
    # Missing ones are played by the same command; a script's corrections would be of another kind.
    use_window(monkeypatch, *TICKS)
    assert collect(job, torch.device("cpu"), 1, lines.append)["k_intervention"].num_episodes == 3
    scripted = open_collection(job.out, "reach", {INTERVENTION: 4}, job.config, seed=7)
    with pytest.raises(UsageError, match="collected with another correction_frames"):
        collect(scripted, torch.device("cpu"), 1, lines.append)


def test_who_leaves_at_once_is_told_that_nothing_is_there(tmp_path, monkeypatch, capsys):
    use_window(monkeypatch, NOTHING._replace(closed=True))
    command = ["collect", "--env", "reach", "--out", str(tmp_path / "n"), "--corrections", "2", "--keyboard", *BASE]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "n_intervention: no episode was finished"


def test_what_a_person_cannot_do_ends_in_one_line(tmp_path, monkeypatch):
    use_window(monkeypatch)
    for goals in ({INTERVENTION: 1, AUTO: 1}, {DEMO: 1}):
        with pytest.raises(UsageError, match=r"^--keyboard: is for --corrections alone; collect the others by a"):
            with_keyboard(tmp_path, goals)
    with pytest.raises(UsageError, match=r"^--critic: is not read with --keyboard"):
        with_keyboard(tmp_path, {INTERVENTION: 1}, critic=tmp_path)
    # A person needs no expert, but there has to be a policy.
    cart = load_config(None, [*BASE, "env.state_key=agent/place", "env.cameras.front=eye"])
    with pytest.raises(UsageError, match=r"of a --checkpoint can be collected, and its --corrections with --keyboard$"):
        open_collection(tmp_path, "tests.envs.fake_world:Cart", {INTERVENTION: 1}, cart, corrector="keyboard")
    monkeypatch.setattr(keyboard, "MOVES", keyboard.MOVES[:1])
    with pytest.raises(UsageError, match=r"^--keyboard: moves up to 1 action dims, --env reach has 2$"):
        with_keyboard(tmp_path, {INTERVENTION: 1})
