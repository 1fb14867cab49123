"""Rollout evaluation of a real policy in the built-in task: the same results however the episodes are spread."""

import json
from pathlib import Path

import av
import pytest
import torch

from recap_ds.distributed.runtime import RankInfo, Runtime
from recap_ds.errors import UsageError
from recap_ds.evaluate.rollout_results import EVAL_INFO_NAME, rollout_table, summarise_rollouts, write_eval_info
from recap_ds.evaluate.rollouts import Checkpoint, make_plans, open_rollouts, play_rollouts
from recap_ds.models.pretrained import load_pretrained
from recap_ds.rollout.actor import Arm, choose_arms
from recap_ds.rollout.workers import count_workers
from tests.distributed.harness import run_ranks
from tests.rollout.made_policy import save_policy
from tests.tiny import tiny_config

ALONE = Runtime(RankInfo(), torch.device("cpu"), "gloo")
ARMS = ["evaluation.indicators=[positive,none]", "evaluation.guidance_betas=[1.0,3.0]", "evaluation.num_videos=1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Exports joint (with critics), policy, critic, and hand (another camera)."""
    folder = tmp_path_factory.mktemp("rollouts")
    save_policy(folder / "joint")
    save_policy(folder / "policy", seed=1, stage="policy")
    save_policy(folder / "critic", stage="critic")
    save_policy(folder / "hand", cameras=("hand",))
    return folder


def open_job(root, *overrides, name="joint", env="reach", num_episodes=7, **options):
    export = root / name
    policy = load_pretrained(export, overrides)
    checkpoint = Checkpoint(name, export)
    return open_rollouts(checkpoint, policy, env, num_episodes, RankInfo(), overrides=overrides, **options)


@pytest.fixture(scope="module")
def played(root, tmp_path_factory):
    """One process, one environment."""
    job = open_job(root, *ARMS, other=Checkpoint("joint again", root / "joint"))
    folder = tmp_path_factory.mktemp("played")
    return job, play_rollouts(job, ALONE, folder / "videos"), folder


def without_videos(records):
    return [{key: value for key, value in record.items() if key != "video"} for record in records]


def test_results_do_not_depend_on_ranks_or_environments(root, played, tmp_path):
    _, once, _ = played
    assert len(once.records) == 4 * 7
    several = open_job(root, *ARMS, "evaluation.num_envs=4", other=Checkpoint("joint again", root / "joint"))
    assert several.num_workers == 4
    assert play_rollouts(several, ALONE, tmp_path / "videos").records == once.records
    ranks = run_ranks(
        "evaluate.rollout_worker", 2, str(root / "joint"), str(tmp_path / "videos"), *ARMS, "evaluation.num_envs=2"
    )
    assert ranks[0]["records"] == ranks[1]["records"] == once.records
    assert ranks[1]["gathered"] == [{"rank": 0, "text": "x"}, {"rank": 1, "text": "xxxxxx"}]


def test_the_same_checkpoint_does_the_same_and_others_do_not(played):
    _, once, _ = played
    entries = [[record["actions_crc32"] for record in once.records if record["entry"] == n] for n in range(4)]
    assert entries[0] == entries[3]
    assert all(a != b for a, b in zip(entries[0], entries[1], strict=True))
    assert all(a != b for a, b in zip(entries[0], entries[2], strict=True))
    assert len(set(entries[0])) == 7


def test_a_frame_is_rendered_only_where_the_policy_looks(played):
    _, once, _ = played
    for record in once.records:
        looks = -(-record["frames"] // 4)  # chunks of four frames
        assert record["rendered"] == (record["frames"] if record["video"] else looks)


def test_films_have_every_frame_and_their_names_are_in_the_record(played):
    job, once, folder = played
    films = {(record["entry"], record["episode"]): record for record in once.records if record["video"]}
    assert list(films) == [(n, 0) for n in range(4)]
    assert films[1, 0]["video"] == "videos/entry1_positive_beta3_episode0000.mp4"
    with av.open(str(folder / films[0, 0]["video"])) as container:
        num_frames = sum(1 for _ in container.decode(video=0))
    held = round(job.spec.fps)
    assert num_frames == films[0, 0]["frames"] - 1 + held


def test_the_summary_and_its_table(played, tmp_path):
    job, once, _ = played
    rollouts = summarise_rollouts(job, once)
    told = [(e["checkpoint"], e["indicator"], e["guidance_beta"]) for e in rollouts["entries"]]
    assert told == [
        ("joint", "positive", 1.0),
        ("joint", "positive", 3.0),
        ("joint", None, 1.0),
        ("joint again", "positive", 1.0),
    ]
    first, *_, again = rollouts["entries"]
    assert first["paired_with_first_entry"] is None
    assert again["paired_with_first_entry"]["p_value"] == 1.0
    assert again["paired_with_first_entry"]["only_this"] == 0 == again["paired_with_first_entry"]["only_reference"]
    assert first["num_successes"] == sum(e["success"] for e in first["episodes"])
    assert set(first["tasks"]) == {"reach_red", "reach_blue"} and first["tasks"]["reach_red"]["num_episodes"] == 4
    table = rollout_table(rollouts)
    assert "positive beta 3" in table and "of joint again" in table and "p = 1" in table
    write_eval_info(tmp_path, rollouts)
    info = json.loads((tmp_path / EVAL_INFO_NAME).read_text())
    assert info["overall"]["n_episodes"] == 7 and info["overall"]["pc_success"] == 100 * first["success_rate"]
    assert [len(part["metrics"]["successes"]) for part in info["per_task"]] == [4, 3]
    assert info["overall"]["eval_ep_s"] == pytest.approx(once.wall_seconds / 28)


def test_executed_frames_are_how_often_the_policy_looks(root, tmp_path):
    job = open_job(root, "evaluation.executed_frames=1", num_episodes=2)
    records = play_rollouts(job, ALONE, tmp_path).records
    assert [record["rendered"] for record in records] == [record["frames"] for record in records]


def test_ways_to_act_are_every_indicator_with_every_guidance():
    def arms(**sections):
        return choose_arms(tiny_config(**sections))

    assert arms() == [Arm("positive", 1.0)]
    both = arms(evaluation={"indicators": ["positive", "none", "none"], "guidance_betas": [1.0, 1.5, 1.5]})
    assert both == [Arm("positive", 1.0), Arm("positive", 1.5), Arm(None, 1.0)]
    # A policy that never saw an indicator acts one way.
    weighted = {"policy_extraction": "weighted"}
    assert arms(recap=weighted, evaluation={"indicators": ["positive", "negative"]}) == [Arm(None, 1.0)]


def test_seeds_and_tasks_follow_from_the_episode(root):
    job = open_job(root, "evaluation.rollout_seed=50", "evaluation.num_videos=2")
    plans = make_plans(job, job.contestants[0]._replace(entries=[0, 1]))
    assert [plan.seed for plan in plans] == [*range(50, 57)] * 2
    assert [plan.task for plan in plans[:3]] == ["reach_red", "reach_blue", "reach_red"]
    assert [plan.keeps_pictures for plan in plans] == ([True, True] + [False] * 5) * 2


def test_there_are_never_more_environments_than_rows():
    evaluation = tiny_config(evaluation={"num_envs": 9, "rollout_batch_size": 4}).evaluation
    assert count_workers(evaluation, local_world=1) == 4
    evaluation = tiny_config(evaluation={"rollout_batch_size": 64}).evaluation
    assert count_workers(evaluation, local_world=10**6) == 1


def test_each_of_two_policies_sees_and_is_told_what_it_was_trained_on(root, tmp_path, capsys):
    """What the second one does beside the first is what it does alone, to the last bit."""
    save_policy(root / "other", cameras=("top", "wrist"), prompts={"reach_red": "go to red"}, image_size=24)
    other = Checkpoint("other", root / "other")
    job = open_job(root, other=other, num_episodes=3)
    assert [contestant.world.settings.cameras for contestant in job.contestants] == [("top",), ("top", "wrist")]
    assert make_plans(job, job.contestants[1])[0].prompt == "go to red"
    assert capsys.readouterr().err == (
        "note: --compare other: the policy was never told 'move to the blue target'; if its words are others: "
        "env.prompts.reach_blue=WORDS\n"
    )
    played = play_rollouts(job, ALONE, tmp_path)
    alone = play_rollouts(open_job(root, name="other", num_episodes=3), ALONE, tmp_path)
    assert played.records[3:] == [{**record, "entry": 1} for record in alone.records]
    assert played.records[0]["actions_crc32"] != played.records[3]["actions_crc32"]
    first, second = summarise_rollouts(job, played)["entries"]
    assert (first["image_size"], second["image_size"]) == (job.config.model.image_size, 24)
    assert first["prompts"]["reach_red"] == "move to the red target" and second["prompts"]["reach_red"] == "go to red"
    assert [e["seed"] for e in first["episodes"]] == [e["seed"] for e in second["episodes"]]


def test_two_policies_must_be_able_to_share_episodes(root):
    save_policy(root / "slow", env={"max_steps": 30})
    with pytest.raises(UsageError, match=r"^--compare slow: its env.max_steps is 30, that of --checkpoint 12, so"):
        open_job(root, other=Checkpoint("slow", root / "slow"))
    assert open_job(root, "env.max_steps=20", other=Checkpoint("slow", root / "slow")).spec.max_steps == 20
    with pytest.raises(UsageError, match=r"--compare .*critic: holds a critic"):
        open_job(root, other=Checkpoint("critic", root / "critic"))


@pytest.mark.parametrize(
    ("overrides", "options", "said"),
    [
        ([], {"name": "critic"}, "holds a critic, which judges and does not act"),
        ([], {"name": "hand"}, "has no camera 'hand' (top, wrist)"),
        ([], {"env": "recah"}, "--env recah: unknown"),
        (["env.prompts.reach_green=go"], {}, "env.prompts.reach_green: --env reach has no such task"),
        (["env.fps=3"], {}, "env.fps: is not read by --env reach"),
        (
            ["env.state_key=agent/place", "env.cameras.top=eye"],
            {"env": "tests.envs.fake_world:Cart"},
            "has 2 state dims",
        ),
    ],
)
def test_what_does_not_fit_ends_in_one_line(root, overrides, options, said):
    with pytest.raises(UsageError) as error:
        open_job(root, *overrides, **options)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_critic_of_its_own_may_judge_and_others_are_refused(root):
    assert open_job(root, name="policy", critic=root / "critic").contestants[0].actor._judge is not None
    assert open_job(root, name="policy").contestants[0].actor._judge is None
    for name, said in (("policy", "holds no critic"), ("hand", "looks through 'hand'")):
        with pytest.raises(UsageError, match=said):
            open_job(root, name="policy", critic=root / name)


def test_what_is_allowed_and_probably_not_meant_is_said(root, capsys):
    open_job(root, "env.prompts.reach_red=fetch the red ball")
    assert "note: the policy was never told 'fetch the red ball'" in capsys.readouterr().err
    open_job(root)
    assert capsys.readouterr().err == ""
