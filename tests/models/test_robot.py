"""A policy in a robot's units: what goes in and comes out, and what is refused."""

import numpy as np
import pytest
import torch

from recap_ds.batch import Observation
from recap_ds.errors import UsageError
from recap_ds.models.policy import PiStarRECAPPolicy
from recap_ds.models.pretrained import acting_dtype
from recap_ds.models.robot import RobotPolicy
from recap_ds.processing.contract import RobotContract, TaskContract
from recap_ds.processing.normalize import Affine, Normalizer
from recap_ds.processing.tokens import ByteTokenizer, encode_prompts
from tests.tiny import tiny_config, wake

CENTER, SCALE = np.array([1.0, -2.0, 3.0], np.float32), np.array([2.0, 4.0, 0.5], np.float32)


@pytest.fixture(scope="module")
def robot() -> RobotPolicy:
    config = tiny_config(model={"max_prompt_tokens": 12})
    policy = PiStarRECAPPolicy(config)
    wake(policy)
    normalizer = Normalizer(
        "mean_std",
        state=Affine(CENTER, SCALE, config.max_state_dim),
        actions=Affine(CENTER[:2], SCALE[:2], config.max_action_dim),
    )
    contract = RobotContract(
        cameras=("front", "wrist"),
        image_size=32,
        state_dim=3,
        action_dim=2,
        fps=10.0,
        tasks={"push": TaskContract(prompt="push", max_length=30)},
        normalizer=normalizer.to_dict(),
        manifest_hash="0" * 64,
    )
    return RobotPolicy(policy, contract, ByteTokenizer(), "cpu")


def observation(**changes) -> dict:
    generator = np.random.default_rng(0)
    seen = {f"observation/{name}": generator.integers(0, 256, (48, 64, 3), np.uint8) for name in ("front", "wrist")}
    return {**seen, "observation/state": np.array([3.0, 2.0, 3.0]), "prompt": "push", **changes}


def test_units_are_the_robots_on_both_sides(robot):
    chunk = robot.predict_chunk(observation(), seed=3)
    policy = robot._policy
    assert chunk.shape == (policy.config.chunk_size, 2)
    # The same by hand: normalised state, letterboxed images, prompt tokens; then actions * scale + center.
    seen = robot._encoder.encode([observation()])
    assert seen.state[0].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert seen.images.shape == (1, 2, 3, 32, 32)
    assert (seen.images[0, :, :, :4] == 0).all(), "a 48 x 64 picture has black bars above and below"
    tokens, _ = encode_prompts(ByteTokenizer(), ["push"], 12)
    assert seen.tokens.tolist() == tokens.tolist()
    noise = torch.randn(1, *chunk.shape[:1], policy.config.max_action_dim, generator=torch.Generator().manual_seed(3))
    dims = torch.arange(policy.config.max_action_dim)[None] < 2
    by_hand = policy.predict_action_chunk(Observation(*seen), noise=noise, action_dim_mask=dims)[0, :, :2].numpy()
    np.testing.assert_allclose(chunk, by_hand * SCALE[:2] + CENTER[:2], rtol=1e-6)


def test_seed_indicator_and_guidance_reach_the_action(robot):
    chunk = robot.predict_chunk(observation(), seed=3)
    np.testing.assert_array_equal(chunk, robot.predict_chunk(observation(), seed=3))
    for other in ({"seed": 4}, {"seed": 3, "advantage": "negative"}, {"seed": 3, "guidance_beta": 2.0}):
        assert np.abs(chunk - robot.predict_chunk(observation(), **other)).max() > 1e-4, other


def test_requests_share_a_forward_and_not_their_answers(robot):
    told = [{"seed": 1}, {"seed": 2, "advantage": None}, {"seed": 3, "advantage": "negative", "guidance_beta": 2.0}]
    seen = [observation(), observation(prompt="push it"), observation(**{"observation/state": np.zeros(3)})]
    passes = []
    hook = robot._policy.vlm.register_forward_hook(lambda module, args, output: passes.append(len(output.hidden)))
    together = robot.predict_chunks([robot.request(what, **options) for what, options in zip(seen, told, strict=True)])
    hook.remove()
    assert passes == [3]
    for chunk, what, options in zip(together, seen, told, strict=True):
        np.testing.assert_allclose(chunk, robot.predict_chunk(what, **options), rtol=1e-4, atol=1e-5)


def test_the_precision_is_that_of_training_and_float32_on_a_cpu(robot):
    assert robot.dtype == torch.float32
    device = torch.device("cuda")
    assert acting_dtype(tiny_config(training={"use_amp": True}), device) == torch.bfloat16
    assert acting_dtype(tiny_config(training={"use_amp": False}), device) == torch.float32
    assert acting_dtype(tiny_config(training={"use_amp": True}), torch.device("cpu")) == torch.float32


def test_act_walks_through_one_chunk(robot):
    robot.reset()
    length = robot._policy.config.chunk_size
    chunk = robot.predict_chunk(observation(), seed=5)
    walked = [robot.act(observation(), seed=5) for _ in range(length)]
    np.testing.assert_array_equal(np.stack(walked), chunk)
    np.testing.assert_array_equal(robot.act(observation(), seed=6), robot.predict_chunk(observation(), seed=6)[0])
    robot.reset()
    np.testing.assert_array_equal(robot.act(observation(), seed=5), chunk[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"observation/state": np.zeros(4)}, "expected 3 finite numbers"),
        ({"observation/state": np.array([0.0, np.nan, 0.0])}, "expected 3 finite numbers"),
        ({"observation/front": np.zeros((48, 64, 3))}, "observation/front: expected uint8"),
        ({"observation/front": np.zeros((48, 64), np.uint8)}, "observation/front: expected uint8"),
        ({"observation/state": np.full(3, 3e38)}, r"observation/state: up to 3e\+38, which is beyond any unit"),
        ({"observation/state": "abc"}, "observation/state: expected 3 numbers"),
        ({"observation/front": np.zeros((0, 64, 3), np.uint8)}, "observation/front: expected uint8"),
        ({"prompt": None}, "prompt: expected text"),
        ({"prompt": "a prompt far too long for this policy"}, "model.max_prompt_tokens"),
    ],
)
def test_what_does_not_fit_is_refused(robot, changes, said):
    with pytest.raises(UsageError, match=said):
        robot.predict_chunk(observation(**changes))


@pytest.mark.parametrize(
    "options",
    [{"advantage": "postive"}, {"guidance_beta": float("nan")}, {"guidance_beta": "2"}, {"seed": -1}, {"seed": 0.5}],
)
def test_wrong_options_are_refused(robot, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        robot.predict_chunk(observation(), **options)


def test_a_missing_camera_is_refused(robot):
    seen = observation()
    del seen["observation/wrist"]
    with pytest.raises(UsageError, match="'observation/wrist' is missing"):
        robot.predict_chunk(seen)
