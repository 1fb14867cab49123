import json

import numpy as np
import pytest

from recap_ds.data.group_stats import describe_statistics, disagreements, group_statistics, lerobot_statistics
from recap_ds.data.manifest import Manifest
from recap_ds.errors import UsageError
from tests.data.made_episodes import made_episode, write


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, [made_episode(i, task="b" if i else "a") for i in range(3)], samples_per_shard=8)
    write(tmp_path, [made_episode(5, 9, name="new/5", task="a", source="auto")], dataset="new")
    return tmp_path


def test_by_source_they_are_the_manifests(folder):
    groups = group_statistics(folder, "source", jobs=2)
    assert disagreements(folder, groups) == []
    assert list(groups) == ["demo", "auto"]


def test_by_data_set_and_task_they_are_those_of_the_episodes(folder):
    by_dataset, by_task = group_statistics(folder, "dataset"), group_statistics(folder, "task")
    assert list(by_dataset) == ["new", "set"] and list(by_task) == list(Manifest.load(folder).tasks)
    np.testing.assert_allclose(by_dataset["new"]["state"].mean, [4, 5])
    np.testing.assert_allclose(by_dataset["new"]["actions"].mean, [5, 6, -1])
    assert (by_dataset["set"]["state"].count, by_task["a"]["state"].count) == (21, 16)
    np.testing.assert_allclose(by_task["b"]["state"].mean, [3, 1.5])
    table = describe_statistics(by_dataset).splitlines()
    assert len(table) == 1 + 2 * (2 + 3) and table[0].split()[:5] == ["group", "feature", "dim", "count", "mean"]


def test_lerobots_names(folder):
    entry = json.loads(json.dumps(lerobot_statistics(group_statistics(folder, "source"))))["auto"]["observation.state"]
    assert set(entry) == {"mean", "std", "min", "max", "count", "q01", "q10", "q50", "q90", "q99"}
    assert entry["count"] == [9] and entry["q50"][0] == pytest.approx(4, abs=0.02)
    assert set(lerobot_statistics(group_statistics(folder, "source"))["demo"]) == {"observation.state", "action"}


def tell_another_mean(folder, source, feature):
    manifest = Manifest.load(folder)
    stats = manifest.statistics[source][feature]
    wrong = stats.model_copy(update={"mean": (stats.mean[0] + 0.01, *stats.mean[1:])})
    statistics = {**manifest.statistics, source: {**manifest.statistics[source], feature: wrong}}
    manifest.model_copy(update={"statistics": statistics}).save(folder)


def test_a_manifest_that_tells_other_figures_is_found(folder):
    tell_another_mean(folder, "auto", "actions")
    (line,) = disagreements(folder, group_statistics(folder, "source"))
    assert line == "manifest.json: its statistics of actions in auto are not those of the samples"


def test_a_damaged_sample_is_named(folder):
    path = folder / "auto-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"NUMPY", b"NUMPX"))
    with pytest.raises(UsageError, match=r"auto-000000\.tar: new-000005-0000\d\.state\.npy: .*shards verify"):
        group_statistics(folder, "source")
    path.unlink()
    with pytest.raises(UsageError, match=r"auto-000000\.tar: cannot be read"):
        group_statistics(folder, "source")
