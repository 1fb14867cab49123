import hashlib
import json

import pytest
from pydantic import ValidationError

from recap_ds.data.manifest import Manifest
from recap_ds.data.stats import FeatureStats
from recap_ds.errors import UsageError
from tests.data.made_episodes import made_episode, write


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return write(tmp_path, [made_episode(), made_episode(1, num_frames=4, outcome="unknown")]).manifest


def test_it_says_what_was_written(manifest, tmp_path):
    assert (manifest.cameras, manifest.state_dim, manifest.action_dim, manifest.action_width) == (("top",), 2, 3, 4)
    assert (manifest.fps, manifest.td_horizon, manifest.image_size) == (10.0, 3, 16)
    assert (manifest.has_next, manifest.has_rewards, manifest.num_samples) == (True, False, 11)
    assert manifest.tasks["sort"].model_dump() == {"prompt": "sort the blocks", "longest": 7, "episodes": 2}
    assert manifest.counts["demo"].outcomes == {"success": 1, "failure": 0, "truncated": 0, "unknown": 1}
    (shard,) = manifest.shards
    data = (tmp_path / shard.name).read_bytes()
    assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    # Frames 0..6 and 0..3: the state's first dim is the frame, the action's is one more.
    stats = manifest.merged_statistics("actions")
    assert (stats.count, stats.mean[0], stats.min[0], stats.max[0]) == (11, pytest.approx(38 / 11), 1.0, 7.0)


def test_save_and_load_are_inverse_and_keep_the_hash(manifest, tmp_path):
    loaded = Manifest.load(tmp_path)
    assert loaded == manifest and loaded.content_hash() == manifest.content_hash()
    changed = manifest.model_copy(update={"td_horizon": 2})
    assert changed.content_hash() != manifest.content_hash()
    changed.save(tmp_path)
    assert Manifest.load(tmp_path) == changed
    assert not list(tmp_path.glob(".manifest*"))


def test_merged_statistics_cover_all_sources(tmp_path):
    episodes = [made_episode(), made_episode(1, source="auto", num_frames=3)]
    manifest = write(tmp_path, episodes).manifest
    parts = [manifest.statistics[source]["state"] for source in ("demo", "auto")]
    assert manifest.merged_statistics("state") == FeatureStats.merge(parts)
    assert manifest.merged_statistics("state").count == 10


def test_it_is_frozen(manifest):
    with pytest.raises(ValidationError):
        manifest.fps = 5.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda values: values.update(schema_version=2), "schema_version is 2.*update recap_ds"),
        (lambda values: values.update(schema_version=None), "schema_version is None.*shards index"),
        (lambda values: values.pop("fps"), "fps: Field required"),
        (lambda values: values.update(extra=1), "extra: Extra inputs"),
        (lambda values: values["shards"][0].update(name="../demo-000000.tar"), "shards.0.name"),
    ],
)
def test_an_invalid_manifest_is_one_line(manifest, tmp_path, damage, message):
    values = json.loads((tmp_path / "manifest.json").read_text())
    damage(values)
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match=message) as caught:
        Manifest.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_or_damaged_files_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="missing; make shards with"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UsageError, match="schema_version is None"):
        Manifest.load(tmp_path)
