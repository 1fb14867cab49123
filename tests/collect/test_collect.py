"""Collection in the built-in task: what is in the shards is what was played, to the frame, whatever interrupted it."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from recap_ds.collect import plans
from recap_ds.collect.job import AUTO, DEMO, INTERVENTION, open_collection
from recap_ds.collect.journal import JOURNAL_NAME, Journal, open_journal
from recap_ds.collect.record import RECORD_NAME
from recap_ds.collect.run import collect
from recap_ds.config import EnvConfig
from recap_ds.data.manifest import Manifest
from recap_ds.data.verify import verify_shards
from recap_ds.envs.build import open_environment
from recap_ds.errors import RunFailed, UsageError
from recap_ds.models.pretrained import load_pretrained
from recap_ds.processing.images import decode_jpeg
from recap_ds.recipe import load_config
from tests.distributed.harness import REPOSITORY
from tests.rollout.made_policy import save_policy

SIZE = 32
BASE = ["env.image_size=32", "chunk_size=4", "evaluation.num_envs=1"]
SEED = 70
GOALS = {AUTO: 3, INTERVENTION: 4, DEMO: 3}


def run(job, report=lambda line: None):
    return collect(job, torch.device("cpu"), 1, report)


def without_policy(out, goals, *overrides, **options):
    return open_collection(out, "reach", goals, load_config(None, [*BASE, *overrides]), **{"seed": SEED, **options})


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    collecting = {"stall_frames": 3, "correction_frames": 5}
    folder = tmp_path_factory.mktemp("collect_policy") / "export"
    return save_policy(folder, env={"max_steps": 25}, collect=collecting)


def with_policy(out, goals, export, *overrides, **options):
    policy = load_pretrained(export, overrides)
    given = {"policy": policy, "checkpoint": "mine", "export": export, "seed": SEED, **options}
    return open_collection(out, "reach", goals, policy.policy.config, **given)


@pytest.fixture(scope="module")
def collected(export, tmp_path_factory):
    out = tmp_path_factory.mktemp("collected") / "iter1"
    job = with_policy(out, GOALS, export)
    return job, run(job)


def read_shards(out):
    """(data set, index) -> frame -> (record, arrays, picture), by tarfile alone."""
    members = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, suffix = info.name.partition(".")
                members.setdefault(key, {})[suffix] = tar.extractfile(info).read()
    episodes = {}
    for parts in members.values():
        record = json.loads(parts["json"])
        arrays = {name: np.load(io.BytesIO(parts[f"{name}.npy"])) for name in ("state", "actions", "rewards")}
        dataset, _, index = record["episode"].partition("/")
        picture = decode_jpeg(parts["top.jpg"])
        episodes.setdefault((dataset, int(index)), {})[record["frame"]] = (record, arrays, picture)
    return episodes


def test_every_frame_is_there_and_replays(collected):
    """From seed and recorded actions the world gives the recorded states, rewards, pictures and outcome again."""
    job, tallies = collected
    episodes = read_shards(job.out)
    assert {name: sum(d == name for d, _ in episodes) for name in tallies} == {
        "iter1_auto": 3,
        "iter1_intervention": 4,
        "iter1_demo": 3,
    }
    world = open_environment("reach", EnvConfig(image_size=SIZE))
    offsets = {"iter1_auto": 0, "iter1_intervention": 1_000_000, "iter1_demo": 2_000_000}
    for (dataset, index), frames in episodes.items():
        first = frames[0][0]
        world.reset(SEED + offsets[dataset] + index, first["task"])
        for frame in range(len(frames)):
            record, arrays, picture = frames[frame]
            np.testing.assert_array_equal(world.state(), arrays["state"])
            assert np.abs(world.images()["top"].astype(int) - picture).mean() < 4  # it went through JPEG
            result = world.step(arrays["actions"][0])
            assert arrays["rewards"][0] == result.reward
            assert record["episode_length"] == len(frames) and record["fps"] == 10.0
        # What running out of time counts as is for the trainer to say.
        assert record["outcome"] == ("success" if result.success else "truncated")
        assert result.success or len(frames) == 25
        assert record["task"] == ("reach_red", "reach_blue")[index % 2]


def test_sources_and_control_say_who_acted(collected):
    job, tallies = collected
    episodes = read_shards(job.out)
    takeovers = 0
    for (dataset, _), frames in episodes.items():
        human = [frames[frame][0]["control"] == "human" for frame in range(len(frames))]
        sources = [frames[frame][0]["source"] for frame in range(len(frames))]
        if dataset == "iter1_auto":
            assert set(sources) == {"auto"} and not any(human)
        elif dataset == "iter1_demo":
            assert set(sources) == {"demo"} and all(human)
        else:
            assert sources == ["intervention" if each else "auto" for each in human]
            # A correction lasts five frames, or until the episode is over.
            starts = [t for t in range(1, len(human)) if human[t] and not human[t - 1]]
            takeovers += len(starts)
            assert all(all(human[t : t + 5]) for t in starts)
            for t in starts:
                # No chunk of the policy's reaches into it.
                assert frames[t - 1][0]["num_valid"] == 1
    assert takeovers > 3
    tally = tallies["iter1_intervention"]
    assert (tally.num_episodes, tally.num_takeovers) == (4, takeovers)
    frames = [
        frame[0] for (name, _), taken in episodes.items() if name == "iter1_intervention" for frame in taken.values()
    ]
    assert tally.num_frames == len(frames)
    assert tally.num_human_frames == sum(record["control"] == "human" for record in frames)
    assert tallies["iter1_demo"][:2] == (3, 3) and tallies["iter1_auto"].num_human_frames == 0
    assert verify_shards(job.out) == []


def test_who_made_it_is_written_down(collected, export):
    job, _ = collected
    record = json.loads((job.out / RECORD_NAME).read_text())
    assert set(record) == {"iter1_auto", "iter1_intervention", "iter1_demo"}
    assert record["iter1_auto"]["acts"] == "positive_beta1" and record["iter1_auto"]["seed"] == SEED
    assert record["iter1_intervention"]["stall_frames"] == 3 and "checkpoint_hash" not in record["iter1_demo"]
    frames = read_shards(job.out)["iter1_auto", 1]
    assert frames[0][0]["origin"] == f"reach seed 71 by mine ({job.checkpoint_hash[:12]})"
    assert frames[0][0]["prompt"] == "move to the blue target"


def test_the_same_command_adds_nothing_and_a_larger_goal_what_is_missing(collected, export):
    job, tallies = collected
    before = Manifest.load(job.out).shards
    lines = []
    assert run(with_policy(job.out, GOALS, export), lines.append) == tallies and lines == []
    assert Manifest.load(job.out).shards == before
    more = run(with_policy(job.out, {AUTO: 4}, export), lines.append)
    assert more["iter1_auto"].num_episodes == 4 and lines[-1].startswith("1 episodes of iter1_auto in auto-")
    assert [path.name for path in (job.out / JOURNAL_NAME).iterdir()] == [".lock"]


def test_other_settings_would_make_other_episodes(collected, export):
    job, _ = collected
    for options, overrides, said in (
        ({"seed": 71}, (), "collected with another seed (70, now 71); give a new one a --name"),
        ({}, ("evaluation.executed_frames=2",), "another executed_frames"),
        ({}, ("collect.stall_frames=9",), "another stall_frames (3, now 9); give"),
        ({}, ("env.max_steps=9",), "another env.max_steps (25, now 9); give"),
    ):
        with pytest.raises(UsageError) as error:
            run(with_policy(job.out, GOALS, export, *overrides, **options))
        assert said in str(error.value)
    # Under a name of its own it joins the others.
    named = with_policy(job.out, {AUTO: 1}, export, seed=5, name="again")
    assert run(named)["again_auto"].num_episodes == 1


def test_a_killed_collection_leaves_a_sound_set_and_the_next_one_finds_what_was_finished(tmp_path):
    out = tmp_path / "k"
    command = [sys.executable, "-m", "recap_ds.cli.main", "collect", "--env", "reach", "--out", str(out)]
    command += ["--demos", "2000", "--seed", str(SEED), *BASE]
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    deadline = time.monotonic() + 120
    while len(list((out / JOURNAL_NAME).glob("k_demo-??????/episode.json"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.parent.name for path in (out / JOURNAL_NAME).glob("k_demo-??????/episode.json")}
    assert len(finished) >= 3
    if (out / "manifest.json").exists():
        assert verify_shards(out) == []
    # As killed in the middle of a frame, and just after shards were written.
    (out / JOURNAL_NAME / "k_demo-999999.tmp").mkdir()
    tally = run(without_policy(out, {DEMO: 2}))["k_demo"]
    assert tally.num_episodes >= len(finished) and verify_shards(out) == []
    assert {f"{dataset}-{index:06d}" for dataset, index in read_shards(out)} >= finished
    assert [path.name for path in (out / JOURNAL_NAME).iterdir()] == [".lock"]


def test_an_interrupted_one_writes_what_is_finished(tmp_path, monkeypatch):
    kept, add = [], Journal.add

    def interrupted(journal, played, label, settings):
        add(journal, played, label, settings)
        kept.append(label.name)
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(without_policy(tmp_path, {AUTO: 9}, name="x"))
    assert {f"{dataset}/{index:06d}" for dataset, index in read_shards(tmp_path)} == set(kept)


def test_a_mediocre_expert_makes_data_for_studies(tmp_path):
    goals = {AUTO: 16, INTERVENTION: 4}
    tallies = run(without_policy(tmp_path, goals, "collect.expert_speed=0.4", "collect.expert_bias=0.5", name="poor"))
    assert 0 < tallies["poor_auto"].num_successes < 16
    assert tallies["poor_intervention"].num_episodes == 4
    frames = read_shards(tmp_path)["poor_auto", 0]
    assert frames[0][0]["source"] == "auto" and frames[0][0]["origin"].endswith("by a mediocre expert")


def test_an_expert_that_never_succeeds_is_not_asked_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "MAX_FAILED_DEMOS_FACTOR", 0)
    said = r"^--demos 1: the expert of reach failed 1 times at 'reach_red'; give it more time \(env.max_steps\) or less"
    with pytest.raises(RunFailed, match=said + r" noise \(collect.demo_noise\)$"):
        run(without_policy(tmp_path / "d", {DEMO: 1}, "env.max_steps=1"))
    # Nothing was collected, so nothing binds to the settings that did not work; from the first one on they do.
    run(without_policy(tmp_path / "d", {DEMO: 1}))
    with pytest.raises(
        UsageError, match=r"collected with another env.max_steps \(None, now 1\); give a new one a --name$"
    ):
        run(without_policy(tmp_path / "d", {DEMO: 2}, "env.max_steps=1"))


def test_a_demonstration_that_fails_is_replaced_by_one_of_its_task(tmp_path):
    """Of these scenes the expert needs 13, 7, 10, 14, 6 and 8 frames: number 3 makes way for 5."""
    tally = run(without_policy(tmp_path / "d", {DEMO: 4}, "env.max_steps=13"))["d_demo"]
    found = {index: frames[0][0]["task"] for (_, index), frames in read_shards(tmp_path / "d").items()}
    assert found == {0: "reach_red", 1: "reach_blue", 2: "reach_red", 5: "reach_blue"}
    assert (tally.num_episodes, tally.num_successes, tally.num_tries) == (4, 4, 5)


def test_one_collection_at_a_time(tmp_path):
    with open_journal(tmp_path), pytest.raises(UsageError, match="another process collects there"):
        run(without_policy(tmp_path, {DEMO: 1}))


def test_what_does_not_fit_ends_in_one_line(collected, export, tmp_path):
    out = collected[0].out
    cart = ["env.state_key=agent/place", "env.cameras.front=eye"]
    config = load_config(None, [*BASE, *cart])
    for call, said in (
        (lambda: open_collection(tmp_path, "tests.envs.fake_world:Cart", {AUTO: 1}, config), "has no scripted expert"),
        (lambda: without_policy(out, {DEMO: 1}, "env.image_size=48"), "image_size is 32 there but 48 here"),
        (lambda: without_policy(out, {DEMO: 1}, "env.cameras.hand=wrist"), "cameras is ('top',) there but ('hand',)"),
        (lambda: without_policy(out, {DEMO: 1}, "env.prompts.reach_red=go red"), "has the prompt 'move to the red"),
        (lambda: without_policy(tmp_path, {DEMO: 1}, name="a/b"), "--name a/b: write it with"),
        (lambda: without_policy(tmp_path, {DEMO: 1}, seed=2**30), "--seed 1073741824: give one below"),
        (lambda: without_policy(tmp_path, {AUTO: 1}, critic=export), "--critic: is read only where a policy acts"),
        (lambda: with_policy(tmp_path, {AUTO: 1}, export, critic=export), "--critic: is read only by --corrections"),
    ):
        with pytest.raises(UsageError) as error:
            call()
        assert said in str(error.value) and "\n" not in str(error.value)


def test_takeovers_may_go_by_a_value_if_there_is_one(export, tmp_path):
    job = with_policy(tmp_path / "v", {INTERVENTION: 1}, export, "collect.progress=value", "collect.stall_frames=4")
    assert run(job)["v_intervention"].num_episodes == 1
    blind = save_policy(tmp_path / "blind", stage="policy")
    with pytest.raises(UsageError, match="value needs a critic"):
        with_policy(tmp_path / "w", {INTERVENTION: 1}, blind, "collect.progress=value")
