"""Labels of whole data sets against advantages computed episode by episode, frame by frame, in plain Python."""

from pathlib import Path

import numpy as np
import pytest

from recap_ds.algo.advantage import INDICATOR_IDS
from recap_ds.batch import CONTROL_IDS, OUTCOME_IDS, SOURCE_IDS
from recap_ds.data.episodes import Episode
from recap_ds.data.labels import write_labels
from recap_ds.data.rebuild import rebuild
from recap_ds.data.shard_set import ShardSet
from recap_ds.errors import UsageError
from recap_ds.label.assign import assign_labels
from recap_ds.label.show import draw_labels
from recap_ds.label.table import label_table
from tests.data.tiny_shards import flat_episode, mixed_set, write_tiny
from tests.label.made_values import column_of, made_settings, store_values

POSITIVE, NEGATIVE, NONE = (INDICATOR_IDS[name] for name in ("positive", "negative", "none"))


def random_value(episode: str, frame: int) -> float:
    """Any number of (episode, frame) in (-1, 0)."""
    return -((sum(episode.encode()) * 31 + frame * 17) % 97 + 1) / 99.0


def expected_advantage(
    episode: Episode, lookahead: int | None, longest: int, timeout_is: str = "failure", takeover_penalty: float = 0.0
) -> list[float | None]:
    """Reward by reward, with c_fail and the normaliser of ``longest`` frames."""
    num_frames = episode.num_frames
    human = np.full(num_frames, episode.source == "demo") if episode.human is None else episode.human
    ended = episode.outcome in ("success", "failure") or timeout_is == "failure"
    result = []
    for start in range(num_frames):
        reward, t = 0.0, start
        while True:
            if t == num_frames - 1 and not ended:
                break  # nothing is known beyond the last observation
            last = t == num_frames - 1
            reward -= (0.0 if episode.outcome == "success" else longest) if last else 1.0
            t += 1
            changes = not last and human[t] != human[start]
            if changes and human[t]:
                reward -= takeover_penalty * longest
            if last or changes or t - start == lookahead:
                break
        if t == start:
            result.append(None)
            continue
        following = random_value(episode.name, t) if t < num_frames else 0.0
        target = min(max(reward / longest + following, -1.0), 0.0)
        result.append(target - random_value(episode.name, start))
    return result


EPISODES = [
    flat_episode(0, 9),
    flat_episode(0, 12, "auto", "success"),
    flat_episode(1, 12, "auto", "failure"),
    flat_episode(2, 7, "auto", "truncated"),
    flat_episode(0, 11, "intervention", "success", human=slice(4, 8)),
    flat_episode(1, 10, "intervention", "failure", human=slice(6, 10)),
    flat_episode(2, 8, "intervention", "truncated", human=slice(0, 3)),
]


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory) -> ShardSet:
    return write_tiny(tmp_path_factory.mktemp("labels"), EPISODES)


@pytest.mark.parametrize("lookahead", [1, 3, 50, "episode"])
@pytest.mark.parametrize("value", [{}, {"timeout_is": "truncated", "takeover_penalty": 0.25}], ids=["plain", "all"])
def test_advantages_are_those_of_each_episode_frame_by_frame(shard_set, lookahead, value):
    tag = f"t{len(value)}{lookahead}"
    stored = store_values(shard_set, tag, column_of(shard_set, random_value), **value)
    record, columns = assign_labels(shard_set, stored, tag, made_settings(lookahead=lookahead))
    frames = None if lookahead == "episode" else lookahead
    assert record.lookahead_frames == frames
    by_name = {episode.name: expected_advantage(episode, frames, 12, **value) for episode in EPISODES}
    table = shard_set.table
    assert len(columns.advantage) == sum(episode.num_frames for episode in EPISODES)
    for sample, advantage in enumerate(columns.advantage):
        wanted = by_name[shard_set.episodes[table.episode[sample]]][table.frame[sample]]
        if wanted is None:
            assert np.isnan(advantage) and columns.indicator[sample] == NONE
        else:
            assert advantage == pytest.approx(wanted, abs=1e-6)


def test_without_takeovers_an_episodes_lookahead_is_the_monte_carlo_advantage(shard_set):
    stored = store_values(shard_set, "mc", column_of(shard_set, random_value))
    _, columns = assign_labels(shard_set, stored, "mc", made_settings(lookahead="episode"))
    alone = ~np.isin(shard_set.table.episode, shard_set.table.episode[shard_set.table.source == 2])
    assert alone.sum() > 30
    np.testing.assert_allclose(columns.advantage[alone], (columns.returns - columns.value)[alone], atol=1e-6)


def test_a_known_episode(tmp_path):
    """A success of 5 frames, measured in 10 frames: notes of the reference implementation, worked out by hand."""
    shards = write_tiny(tmp_path, [flat_episode(0, 5, "auto"), flat_episode(1, 10, "auto", "failure")])
    values = dict(enumerate([-0.5, -0.45, -0.3, -0.15, -0.05]))
    stored = store_values(
        shards, "t", column_of(shards, lambda name, frame: values[frame] if name == "auto/0" else -0.9)
    )
    mine = shards.table.episode == shards.episodes.index("auto/0")
    order = np.argsort(shards.table.frame[mine])
    for lookahead, expected in ((2, [0, 0.1, 0.05, 0.05, 0.05]), (50, [0.1, 0.15, 0.1, 0.05, 0.05])):
        _, columns = assign_labels(shards, stored, "t", made_settings(lookahead=lookahead))
        assert columns.advantage[mine][order].tolist() == pytest.approx(expected, abs=1e-6)
        assert columns.returns[mine][order].tolist() == pytest.approx([-0.4, -0.3, -0.2, -0.1, 0])


@pytest.mark.parametrize("demos", ["positive", "labelled"])
def test_exactly_the_top_fraction_of_what_is_not_forced_is_positive(tmp_path, demos):
    shards = mixed_set(tmp_path)
    if demos == "positive":  # nothing of task cup is ranked then
        assert (shards.table.source[shards.table.task == 1] == SOURCE_IDS["demo"]).all()
    stored = store_values(shards, "t", column_of(shards, random_value))
    record, columns = assign_labels(shards, stored, "t", made_settings(0.3, demos, lookahead=2))
    table = shards.table
    forced = (table.source == SOURCE_IDS["intervention"]) | (
        (table.source == SOURCE_IDS["demo"]) & (demos == "positive")
    )
    assert (columns.indicator[forced] == POSITIVE).all()
    for number, (name, task) in enumerate(record.tasks.items()):
        ranked = (table.task == number) & ~forced
        positive = ranked & (columns.indicator == POSITIVE)
        assert positive.sum() == round(0.3 * ranked.sum()) == task.num_positive
        assert (task.num_forced, task.num_known) == ((table.task == number)[forced].sum(), ranked.sum())
        if not ranked.any():
            assert name == "cup" and (task.threshold, task.sigma, task.positive_fraction) == (None, None, None)
            continue
        negative = ranked & ~positive
        assert columns.advantage[positive].min() >= columns.advantage[negative].max() == pytest.approx(task.threshold)
        assert task.sigma == pytest.approx(columns.advantage[ranked].std(), rel=1e-5)
        assert task.positive_fraction == pytest.approx(0.3, abs=0.01)


def test_what_recap_does_not_do_can_be_done_to_see_what_it_is_worth(tmp_path):
    shards = mixed_set(tmp_path)
    stored = store_values(shards, "t", column_of(shards, random_value))
    table, corrected = shards.table, shards.table.source == SOURCE_IDS["intervention"]

    def labels(**settings):
        return assign_labels(shards, stored, "t", made_settings(0.3, lookahead=2, **settings))[1]

    plain, ranked = labels(), ~corrected
    free = labels(corrections="labelled").indicator == POSITIVE
    assert (plain.indicator[corrected] == POSITIVE).all() and not free[corrected].all()
    assert free.sum() == sum(round(0.3 * (table.task == task).sum()) for task in np.unique(table.task))
    shared = labels(thresholds="shared")
    positive = ranked & (shared.indicator == POSITIVE)
    assert positive.sum() == round(0.3 * ranked.sum())
    assert plain.advantage[positive].min() >= plain.advantage[ranked & ~positive].max()
    dealt, again = labels(shuffle="advantages"), labels(shuffle="advantages")
    np.testing.assert_array_equal(dealt.indicator, again.indicator)
    assert (dealt.indicator != plain.indicator).any()
    for task in np.unique(table.task):
        mine = ranked & (table.task == task)
        np.testing.assert_array_equal(np.sort(dealt.advantage[mine]), np.sort(plain.advantage[mine]))
        assert (dealt.indicator[mine] == POSITIVE).sum() == (plain.indicator[mine] == POSITIVE).sum()
    np.testing.assert_array_equal(dealt.advantage[corrected], plain.advantage[corrected])


@pytest.mark.parametrize("demos", ["positive", "labelled"])
def test_labels_are_dealt_out_with_their_advantages_and_counted_as_they_lie(tmp_path, demos):
    shards = mixed_set(tmp_path)
    stored = store_values(shards, "t", column_of(shards, random_value))
    table, corrected = shards.table, shards.table.source == SOURCE_IDS["intervention"]
    before, plain = assign_labels(shards, stored, "t", made_settings(0.3, demos, lookahead=2))
    record, wholly = assign_labels(shards, stored, "t", made_settings(0.3, demos, lookahead=2, shuffle="labels"))
    assert (wholly.indicator[corrected] != POSITIVE).any()
    for number, (name, task) in enumerate(record.tasks.items()):
        mine = table.task == number

        def pairs(columns, mine=mine):
            """A weighted policy learns of the advantage, a conditioned one of the indicator."""
            return sorted(zip(columns.advantage[mine].tolist(), columns.indicator[mine].tolist(), strict=True))

        assert pairs(wholly) == pairs(plain)
        positive = (wholly.indicator[mine] == POSITIVE).sum()
        assert (task.num_forced, task.num_known, task.num_positive) == (0, mine.sum(), positive)
        assert task.positive_fraction == pytest.approx(positive / mine.sum())
        assert (task.threshold, task.sigma) == (before.tasks[name].threshold, before.tasks[name].sigma)
    if demos == "positive":  # all of cup is demonstrations
        assert (task.num_positive, task.threshold, task.sigma) == (task.num_known, None, None)


def test_tasks_that_share_a_threshold_may_lie_wholly_on_either_side_of_it(tmp_path):
    shards = write_tiny(tmp_path, [flat_episode(i, 10, "auto", task=task) for i, task in enumerate(("cube", "cup"))])
    cup = shards.table.task == list(shards.manifest.tasks).index("cup")
    values = column_of(shards, random_value) / 100
    stored = store_values(shards, "t", np.where(cup, -1.0, values).astype(np.float32))
    record, columns = assign_labels(shards, stored, "t", made_settings(0.5, lookahead="episode", thresholds="shared"))
    assert (columns.indicator[cup] == POSITIVE).all() and (columns.indicator[~cup] == NEGATIVE).all()
    assert (record.tasks["cup"].positive_fraction, record.tasks["cube"].positive_fraction) == (1.0, 0.0)
    assert record.tasks["cup"].threshold == record.tasks["cube"].threshold == columns.advantage[~cup].max()
    write_labels(shards, "t", record, columns)
    assert "label.thresholds=shared" in label_table(shards, "t")
    assert len(draw_labels(shards, "t", tmp_path / "pictures")) == 3
    with pytest.raises(UsageError, match=r"all tasks together have too few samples for 0\.001: of the 20 .*, 0 would"):
        assign_labels(shards, stored, "t", made_settings(0.001, thresholds="shared"))
    # A task of one sample has no threshold of its own, and needs none here.
    small = write_tiny(tmp_path / "small", [flat_episode(0, 10, "auto"), flat_episode(1, 1, "auto", task="cup")])
    stored = store_values(small, "t", column_of(small, random_value))
    assign_labels(small, stored, "t", made_settings(0.3, thresholds="shared"))
    with pytest.raises(UsageError, match="task 'cup' has too few"):
        assign_labels(small, stored, "t", made_settings(0.3))


def test_equal_advantages_are_parted_by_key_whichever_shard_they_are_in(tmp_path):
    """A perfect value function: every advantage of a success is exactly the same."""
    episodes = [flat_episode(i, 8, "auto") for i in range(5)]
    indicator = {}
    for folder, samples_per_shard in (("a", 7), ("b", 40)):
        shards = write_tiny(tmp_path / folder, episodes, samples_per_shard=samples_per_shard)
        stored = store_values(shards, "t", column_of(shards, lambda name, frame: 0.0))
        _, columns = assign_labels(shards, stored, "t", made_settings(0.25, lookahead=1))
        ranks = np.argsort(stored.key_rank[columns.indicator == POSITIVE])
        assert len(ranks) == 10
        places = zip(shards.table.episode.tolist(), shards.table.frame.tolist(), strict=True)
        names = [(shards.episodes[episode], frame) for episode, frame in places]
        indicator[folder] = {name for name, mine in zip(names, columns.indicator, strict=True) if mine == POSITIVE}
    assert indicator["a"] == indicator["b"]
    # Only a last frame gains anything over "one step less to go"; the others part by key.
    assert {("auto/" + str(i), 7) for i in range(5)} <= indicator["a"]
    assert {("auto/0", frame) for frame in range(5)} <= indicator["a"]


def test_a_sample_that_could_not_be_read_is_left_out(shard_set):
    value = column_of(shard_set, random_value)
    sample = int(np.flatnonzero((shard_set.table.source == SOURCE_IDS["auto"]) & (shard_set.table.frame == 3))[0])
    value[sample] = np.nan
    stored = store_values(shard_set, "damaged", value)
    record, columns = assign_labels(shard_set, stored, "damaged", made_settings(lookahead=2))
    unknown = np.flatnonzero(np.isnan(columns.advantage))
    # Itself, and the sample that looks ahead to it.
    assert shard_set.table.frame[unknown].tolist().count(3) == 1
    assert sorted(shard_set.table.frame[unknown].tolist()) == [1, 3]
    assert (columns.indicator[unknown] == NONE).all()
    (task,) = record.tasks.values()
    assert task.num_samples - task.num_forced - task.num_known == 2


def test_iql_advantages_and_blends(shard_set):
    value = column_of(shard_set, random_value)
    own = np.random.default_rng(0).normal(size=len(value)).astype(np.float32)
    own[5] = np.nan
    stored = store_values(shard_set, "iql", value, own, critic="iql")
    n_step = store_values(shard_set, "mc2", value)
    _, alone = assign_labels(shard_set, stored, "iql", made_settings(source="iql"))
    np.testing.assert_array_equal(alone.advantage, own)
    _, blend = assign_labels(shard_set, stored, "iql", made_settings(source="blend", blend=0.25, lookahead=3))
    _, looked = assign_labels(shard_set, n_step, "mc2", made_settings(lookahead=3))
    np.testing.assert_allclose(blend.advantage, 0.25 * looked.advantage + 0.75 * own, rtol=1e-5)
    assert blend.indicator[5] in (NONE, POSITIVE) and np.isnan(blend.advantage[5])


@pytest.mark.parametrize(
    ("critic", "reward", "source", "said"),
    [
        ("iql", "sparse_time", "distributional", "set iql or blend"),
        ("distributional", "sparse_time", "iql", "set distributional"),
        ("distributional", "sparse_time", "blend", "set distributional"),
        ("iql", "environment", "blend", "set iql"),
    ],
)
def test_a_source_that_the_critic_cannot_give_is_refused(shard_set, critic, reward, source, said):
    value = column_of(shard_set, random_value)
    stored = store_values(
        shard_set, f"{critic}-{reward}", value, value if critic == "iql" else None, critic=critic, reward=reward
    )
    with pytest.raises(UsageError, match=said):
        assign_labels(shard_set, stored, "x", made_settings(source=source))


def test_too_few_samples_for_the_fraction_are_refused(shard_set):
    stored = store_values(shard_set, "few", column_of(shard_set, random_value))
    with pytest.raises(UsageError, match=r"task 'cube' has too few samples for 0\.001: of the \d+ .*, 0 would be"):
        assign_labels(shard_set, stored, "few", made_settings(0.001))


def test_a_lookahead_that_the_stride_does_not_divide_is_refused(tmp_path):
    episodes = [flat_episode(0, 20, "auto"), flat_episode(0, 21, "intervention", human=slice(6, 13))]
    shards = write_tiny(tmp_path, episodes, stride=3)
    stored = store_values(shards, "t", column_of(shards, random_value))
    with pytest.raises(UsageError, match=r"label\.lookahead: 4 frames is no multiple of the stride of 3 .* 3 or 6"):
        assign_labels(shards, stored, "t", made_settings(lookahead=4))
    with pytest.raises(UsageError, match=r"label\.lookahead: 2 .* set 3$"):
        assign_labels(shards, stored, "t", made_settings(lookahead=2))
    _, columns = assign_labels(shards, stored, "t", made_settings(lookahead=6))
    by_name = {episode.name: expected_advantage(episode, 6, 21) for episode in episodes}
    rows = zip(shards.table.episode.tolist(), shards.table.frame.tolist(), columns.advantage, strict=True)
    for episode, frame, advantage in rows:
        assert advantage == pytest.approx(by_name[shards.episodes[episode]][frame], abs=1e-6)


def test_a_truncated_episode_with_a_stride_looks_ahead_to_its_last_sample(tmp_path):
    shards = write_tiny(tmp_path, [flat_episode(0, 9, "auto", "truncated"), flat_episode(1, 9, "auto")], stride=3)
    stored = store_values(shards, "t", column_of(shards, random_value), timeout_is="truncated")
    _, columns = assign_labels(shards, stored, "t", made_settings(lookahead="episode"))
    mine = {
        int(frame): advantage
        for frame, episode, advantage in zip(shards.table.frame, shards.table.episode, columns.advantage, strict=True)
        if shards.episodes[episode] == "auto/0"
    }
    value = [random_value("auto/0", frame) for frame in range(9)]
    assert mine[0] == pytest.approx(max(-6 / 9 + value[6], -1) - value[0], abs=1e-6)
    assert mine[3] == pytest.approx(max(-3 / 9 + value[6], -1) - value[3], abs=1e-6)
    assert np.isnan(mine[6])


def drop_shard(folder: Path, name: str) -> ShardSet:
    for path in folder.glob(f"{name}*"):
        path.unlink()
    rebuild(folder, jobs=1)
    return ShardSet.open(folder)


def test_a_missing_frame_is_named_where_the_lookahead_needs_it(tmp_path):
    write_tiny(tmp_path, [flat_episode(i, 12, "auto") for i in range(4)])
    shards = drop_shard(tmp_path, "auto-000001")
    stored = store_values(shards, "t", column_of(shards, random_value))
    with pytest.raises(UsageError, match=r"episode auto/\d lacks frame \d+, which the advantage of its frame \d+"):
        assign_labels(shards, stored, "t", made_settings(lookahead=2))
    # To the end of a success nothing is looked up.
    assign_labels(shards, stored, "t", made_settings(lookahead="episode"))


def test_ids_are_those_of_the_index(shard_set):
    """What the expectations above take for granted about the tiny shards."""
    table = shard_set.table
    assert {int(value) for value in table.outcome} == {
        OUTCOME_IDS[name] for name in ("success", "failure", "truncated")
    }
    human = table.control == CONTROL_IDS["human"]
    assert (table.source[human] != SOURCE_IDS["auto"]).all() and (table.source[~human] == SOURCE_IDS["auto"]).all()
