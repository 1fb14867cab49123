import numpy as np
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


@pytest.mark.parametrize("column", ["intervention", "is_intervention", "complementary_info.is_intervention"])
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
