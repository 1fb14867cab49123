import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recap_ds.data.lerobot.metadata import load_metadata
from recap_ds.data.lerobot.outcomes import read_labels
from recap_ds.data.lerobot.reader import ImportOptions, read_episodes
from recap_ds.errors import UsageError
from tests.data.lerobot.tiny_dataset import write_dataset

LENGTHS = (4, 3, 5)


def episodes_of(root, source, **options):
    return list(read_episodes(load_metadata(root), ImportOptions(source=source, name="set", **options)))


def outcomes_of(root, source, **options):
    return [episode.outcome for episode in episodes_of(root, source, **options)]


def true_at(*places):
    """A flag column that is true at the given (episode, frame) places."""
    return lambda episode, length: [(episode, frame) in places for frame in range(length)]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        # Success anywhere in the episode counts, also where recording went on after it.
        ({"next.success": true_at((0, 3), (1, 1))}, ["success", "success", "failure"]),
        (
            {"next.success": true_at((0, 3)), "next.truncated": true_at((0, 3), (1, 2))},
            ["success", "truncated", "failure"],
        ),
        ({"next.truncated": true_at((0, 3), (1, 2), (2, 4))}, ["truncated"] * 3),
        # Recorded as 0 and 1 by some.
        (
            {"next.success": lambda episode, length: [0.0] * (length - 1) + [float(episode == 2)]},
            ["failure", "failure", "success"],
        ),
    ],
)
def test_outcome_rules_for_policy_data(tmp_path, columns, expected):
    write_dataset(tmp_path, LENGTHS, columns=columns)
    assert outcomes_of(tmp_path, "auto") == expected


def constant(*values):
    """A column that is one value from start to end of each episode."""
    return lambda episode, length: [values[episode]] * length


def at_the_end(*values, before):
    return lambda episode, length: [before] * (length - 1) + [values[episode]]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        # RLinf.
        ({"is_success": constant(True, False, True)}, ["success", "failure", "success"]),
        # HIL-SERL: a reward of 1 is a success; an episode that never ended was cut off.
        (
            {"next.reward": true_at((0, 3)), "next.done": true_at((0, 3), (1, 2))},
            ["success", "failure", "truncated"],
        ),
        ({"next.reward": at_the_end(0.0, 1.0, 0.0, before=0.0)}, ["failure", "success", "failure"]),
        # LeRobot's RECAP branch: returns end at 0, or at the cost of failing.
        (
            {
                "is_terminal": at_the_end(True, True, False, before=False),
                "mc_return": at_the_end(0.0, -0.5, -0.1, before=-0.6),
            },
            ["success", "failure", "truncated"],
        ),
        # A flag says more than a reward.
        (
            {"next.success": true_at((2, 4)), "next.reward": true_at((0, 3))},
            ["failure", "failure", "success"],
        ),
    ],
)
def test_every_recorder_is_understood(tmp_path, columns, expected):
    write_dataset(tmp_path, LENGTHS, columns=columns)
    assert outcomes_of(tmp_path, "auto") == expected


@pytest.mark.parametrize(
    "column",
    [
        {"next.reward": constant(0.0, 0.0, 0.0)},  # nobody ever gave one
        {"next.reward": at_the_end(1.0, 0.0, 1.0, before=0.25)},  # shaped: how much is enough is not ours to say
        {"next.done": at_the_end(True, True, True, before=False)},
        {"mc_return": at_the_end(0.0, 0.0, 0.0, before=-1.0)},  # and nothing says whether the episodes ended
    ],
)
def test_what_says_too_little_is_not_guessed_from(tmp_path, column):
    write_dataset(tmp_path, LENGTHS, columns=column)
    with pytest.raises(UsageError, match="no outcome is recorded for 3 auto episodes"):
        outcomes_of(tmp_path, "auto")
    assert outcomes_of(tmp_path, "demo") == ["success"] * 3


def rows_of(lengths, **columns):
    places = [(episode, frame) for episode, length in enumerate(lengths) for frame in range(length)]
    return pa.table({"episode_index": [place[0] for place in places], **columns}), [place[1] for place in places]


def test_the_returns_of_a_sidecar_tell_the_outcome(tmp_path):
    write_dataset(tmp_path, LENGTHS)
    rewards = [-1.0, -1, -1, 0, -1, -1, -300, -1, -1, -1, -1, 0]
    table, frames = rows_of(LENGTHS, reward=rewards)
    # Not in the order of frames.
    table = table.append_column("frame_index", pa.array(frames)).take(list(reversed(range(12))))
    pq.write_table(table, tmp_path / "meta/returns_first.parquet")
    assert outcomes_of(tmp_path, "auto") == ["success", "failure", "success"]
    pq.write_table(table.slice(1), tmp_path / "meta/returns_first.parquet")
    with pytest.raises(UsageError, match=r"returns_first\.parquet: 4 rows of episode 2, which has 5 frames"):
        outcomes_of(tmp_path, "auto")
    pq.write_table(table, tmp_path / "meta/returns.parquet")
    with pytest.raises(UsageError, match=r"several returns \(returns\.parquet, returns_first\.parquet\)"):
        outcomes_of(tmp_path, "auto")


def test_progress_of_a_reward_model_is_asked_only_where_one_says_so(tmp_path):
    write_dataset(tmp_path, LENGTHS)
    with pytest.raises(UsageError, match=r"sarm_progress\.parquet: no such file"):
        outcomes_of(tmp_path, "auto", success_progress=0.9)
    progress = [0.1, 0.5, 0.9, 0.95, 0.1, 0.9, 0.6, 0.0, 0.2, 0.4, 0.8, 0.9]
    table, _ = rows_of(LENGTHS, progress_sparse=progress, index=list(range(12)))
    pq.write_table(table, tmp_path / "sarm_progress.parquet")
    with pytest.raises(UsageError, match="no outcome is recorded"):
        outcomes_of(tmp_path, "auto")
    assert outcomes_of(tmp_path, "auto", success_progress=0.9) == ["success", "failure", "success"]


def test_demos_succeed_unless_a_column_says_otherwise(tmp_path):
    write_dataset(tmp_path / "plain", LENGTHS)
    assert outcomes_of(tmp_path / "plain", "demo") == ["success"] * 3
    write_dataset(tmp_path / "flagged", LENGTHS, columns={"next.success": true_at((0, 3))})
    assert outcomes_of(tmp_path / "flagged", "demo") == ["success", "failure", "failure"]


def test_policy_data_of_unknown_outcome_is_refused_with_the_list(tmp_path):
    write_dataset(tmp_path, LENGTHS, columns={"next.truncated": true_at((1, 2))})
    with pytest.raises(UsageError, match=r"no outcome is recorded for 2 auto episodes: 0, 2; .*--labels"):
        outcomes_of(tmp_path, "auto")


def test_a_flag_that_is_neither_true_nor_false_is_refused(tmp_path):
    write_dataset(tmp_path, LENGTHS, columns={"next.success": lambda _, length: [0.5] * length})
    with pytest.raises(UsageError, match=r"next\.success is a flag"):
        outcomes_of(tmp_path, "auto")


def test_labels_override_the_columns_and_fill_what_they_lack(tmp_path):
    write_dataset(tmp_path / "set", LENGTHS, columns={"next.success": true_at((0, 3))})
    labels = tmp_path / "labels.csv"
    labels.write_text("episode_index,success\n0,False\n2,1\n")
    assert outcomes_of(tmp_path / "set", "auto", labels=labels) == ["failure", "failure", "success"]
    labels.write_text("episode_index,outcome\n1,truncated\n")
    assert outcomes_of(tmp_path / "set", "auto", labels=labels) == ["success", "truncated", "failure"]


def test_labels_may_name_skipped_episodes(tmp_path):
    write_dataset(tmp_path, LENGTHS)
    (tmp_path / "meta/episode_labels.csv").write_text("episode_index,success\n0,true\n1,false\n2,yes\n")
    metadata = load_metadata(tmp_path, skip_episodes=(0,))
    episodes = read_episodes(metadata, ImportOptions(source="auto", name="set"))
    assert [episode.outcome for episode in episodes] == ["failure", "success"]


def test_labels_inside_the_data_set_are_found(tmp_path):
    write_dataset(tmp_path, LENGTHS)
    (tmp_path / "meta/episode_labels.csv").write_text("episode_index,success\n0,true\n1,false\n2,yes\n")
    assert outcomes_of(tmp_path, "auto") == ["success", "failure", "success"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("episode,success\n0,true\n", "first line must name episode_index and outcome"),
        ("episode_index,success\n0,maybe\n", "line 2: success is 'maybe', it must be true or false"),
        (
            "episode_index,outcome\n0,good\n",
            "line 2: outcome is 'good', it must be success, failure, truncated, unknown",
        ),
        ("episode_index,outcome\n0,success\n0,failure\n", "line 3: episode 0 is labelled twice"),
        ("episode_index,outcome\n9,success\n", "line 2: the data set has no episode 9"),
        ("episode_index,outcome\n-1,success\n", "episode_index is '-1', it must be a whole number"),
        ("episode_index,outcome\n0\n", "outcome is None"),
    ],
)
def test_labels_that_make_no_sense_are_refused(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_labels(path, {0, 1})


def test_missing_labels_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"labels\.csv: cannot read the labels"):
        read_labels(tmp_path / "labels.csv", {0})


@pytest.mark.parametrize(
    "column", ["intervention", "is_intervention", "complementary_info.is_intervention", "teleop_mask"]
)
def test_human_frames_of_an_intervention_set(tmp_path, column):
    human = true_at((0, 2), (0, 3), (2, 0))
    write_dataset(tmp_path, LENGTHS, columns={column: human, "next.success": true_at((0, 3))})
    masks = [episode.human for episode in episodes_of(tmp_path, "intervention")]
    for index, (mask, length) in enumerate(zip(masks, LENGTHS, strict=True)):
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, human(index, length))


def test_an_intervention_set_must_say_who_acts(tmp_path):
    write_dataset(tmp_path, LENGTHS, columns={"next.success": true_at((0, 3))})
    with pytest.raises(UsageError, match="no column tells who acts"):
        episodes_of(tmp_path, "intervention")


def test_human_frames_in_an_auto_set_are_refused_and_mean_nothing_in_a_demo_set(tmp_path):
    columns = {"intervention": true_at((1, 2)), "next.success": true_at((0, 3), (1, 2), (2, 4))}
    write_dataset(tmp_path, LENGTHS, columns=columns)
    with pytest.raises(UsageError, match=r"episode set/1: a human acts in 1 frames .* --source intervention"):
        episodes_of(tmp_path, "auto")
    assert [episode.human for episode in episodes_of(tmp_path, "demo")] == [None] * 3


def test_a_set_without_any_takeover_imports_as_auto(tmp_path):
    columns = {"intervention": true_at(), "next.success": true_at((0, 3))}
    write_dataset(tmp_path, LENGTHS, columns=columns)
    assert [episode.human for episode in episodes_of(tmp_path, "auto")] == [None] * 3
