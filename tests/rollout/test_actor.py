"""The model's side: what a request gets depends on the request alone."""

import numpy as np
import pytest
import torch

from recap_ds.config import EnvConfig
from recap_ds.envs.build import open_environment
from recap_ds.envs.interface import observe
from recap_ds.models.pretrained import load_pretrained
from recap_ds.models.robot import RobotPolicy
from recap_ds.rollout.actor import Actor, Arm, Judge
from recap_ds.rollout.requests import Request
from tests.rollout.made_policy import save_policy

ARMS = [Arm("positive", 1.0), Arm(None, 1.0), Arm("negative", 2.5)]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("actor") / "joint")


def actor(export, seed=7, batch_size=4, executed_frames=None):
    pretrained = load_pretrained(export)
    made = Actor(
        pretrained, ARMS, seed=seed, batch_size=batch_size, executed_frames=executed_frames, judge=Judge(pretrained)
    )
    made.to(torch.device("cpu"))
    return made


def request(number, arm=0, frame=0, row=None, wants_value=False):
    env = open_environment("reach", EnvConfig(), ("top",), 32)
    env.reset(number, "reach_red")
    row = number % 4 if row is None else row
    return Request(row, number, arm, frame, observe(env, env.images(), "move to the red target"), wants_value)


def test_a_decision_does_not_depend_on_who_else_asks(export):
    made = actor(export)
    together = made.decide([request(1), request(2, arm=1), request(3, arm=2, wants_value=True), request(4)])
    for number, arm in ((1, 0), (2, 1), (3, 2), (4, 0)):
        (alone,) = made.decide([request(number, arm=arm, wants_value=number == 3)])
        np.testing.assert_array_equal(alone.actions, together[number - 1].actions)
        assert alone.value == together[number - 1].value and (alone.value is None) == (number != 3)


def test_noise_is_keyed_by_seed_episode_and_frame_and_not_by_the_arm(export):
    made = actor(export)
    noise = made._noise([request(1), request(2), request(3, frame=5)])
    same = made._noise([request(3, frame=5, arm=2), request(1)])
    assert torch.equal(noise[1], same[1]) and torch.equal(noise[3], same[3])
    assert not torch.equal(noise[3], made._noise([request(3)])[3])
    assert not torch.equal(noise[1], actor(export, seed=8)._noise([request(1)])[1])
    assert abs(float(noise[1:].std()) - 1.0) < 0.3 and float(noise[0].abs().sum()) == 0.0


def test_actions_are_those_of_the_robot_policy(export):
    """The same observation and noise through ``RobotPolicy``, one at a time."""
    made, asked = actor(export), request(1, arm=2)
    robot = RobotPolicy.from_pretrained(export)
    noise = made._noise([asked])[1:2]
    encoded = robot._encoder.encode([asked.observation])
    chunk = robot._policy.predict_action_chunk(
        encoded, noise=noise, action_dim_mask=robot._action_dims, advantage="negative", guidance_beta=2.5
    )
    expected = robot._normalizer.actions.unnormalize(chunk[0].numpy())
    np.testing.assert_allclose(made.decide([asked])[0].actions, expected, rtol=1e-4, atol=1e-5)


def test_part_of_a_chunk_may_be_executed(export):
    asked = [request(1)]
    whole, part = actor(export).decide(asked)[0].actions, actor(export, executed_frames=3).decide(asked)[0].actions
    assert whole.shape == (4, 2)
    np.testing.assert_array_equal(part, whole[:3])


def test_names_of_arms_are_safe_for_files():
    assert [arm.name for arm in ARMS] == ["positive_beta1", "none", "negative_beta2.5"]
