import numpy as np

from recap_ds.data.verify import verify_shards
from tests.data.made_episodes import made_episode, write

GENERATOR = np.random.default_rng(0)


def episode_with(number, **changes):
    states = GENERATOR.normal(size=(300, 2))
    for (frame, dim), value in changes.pop("glitches", {}).items():
        states[frame, dim] = value
    return made_episode(number, states=states, actions=np.zeros((300, 3)), **changes)


def test_a_glitch_is_told_where_it_stands_and_stored_as_it_is(tmp_path):
    report = write(tmp_path, [episode_with(0), episode_with(4, glitches={(17, 1): -1e6, (18, 1): 9e5})])
    (line,) = report.outliers
    assert line.startswith("episode set/4, frame 17: state[1] is -1e+06, 98 % of the values lie from -2.")
    assert report.manifest.statistics["demo"]["state"].min[1] == -1e6
    assert verify_shards(tmp_path) == []


def test_wide_tails_rare_events_and_constants_are_no_glitches(tmp_path):
    tails, rare = GENERATOR.standard_t(2, size=300), np.zeros(300)
    rare[150] = 1.0  # a gripper that closes once
    actions = np.stack([tails, rare, np.full(300, 7.0)], axis=1)
    assert write(tmp_path, [made_episode(0, states=np.ones((300, 2)), actions=actions)]).outliers == ()
