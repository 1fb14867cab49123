import tarfile

import numpy as np
import pytest

from recap_ds.data.index import SampleRecord, ShardIndex
from recap_ds.data.manifest import Manifest
from recap_ds.data.npy import npy_array, npy_bytes
from recap_ds.data.tar import TarWriter
from recap_ds.data.verify import sample_faults, verify_shards
from recap_ds.processing.images import encode_jpeg
from tests.data.made_episodes import made_episode, read_back, write
from tests.data.test_index import RECORD


@pytest.fixture
def folder(tmp_path):
    episodes = [made_episode(0), made_episode(1, source="auto", outcome="failure")]
    write(tmp_path, episodes, samples_per_shard=4)
    assert verify_shards(tmp_path) == []
    return tmp_path


def test_one_flipped_byte_names_its_sample(folder):
    path = folder / "demo-000001.tar"
    index = ShardIndex.load(ShardIndex.path_of(path))
    data = bytearray(path.read_bytes())
    row, column = 1, index.suffixes.tolist().index("state.npy")
    data[index.offsets[row, column] + index.sizes[row, column] - 1] ^= 1
    path.write_bytes(data)
    findings = verify_shards(folder)
    assert ("demo-000001.tar", "", "sha256 differs from the manifest's") in findings
    assert ("demo-000001.tar", index.keys[row], "crc32 differs from the index's") in findings
    assert len(findings) == 2
    assert findings == verify_shards(folder, jobs=2)


def test_missing_short_and_unlisted_shards_are_found(folder):
    (folder / "demo-000000.tar").rename(folder / "demo-000009.tar")
    cut = folder / "auto-000000.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    findings = [str(finding) for finding in verify_shards(folder)]
    assert "demo-000000.tar: missing" in findings
    assert "demo-000009.tar: not listed in manifest.json; it is not read" in findings
    assert any("auto-000000.tar: has 3000 bytes" in finding for finding in findings)
    assert any("crc32" in finding for finding in findings)
    assert any("cut short" in finding or "not a readable plain tar" in finding for finding in findings)


def test_a_lost_or_foreign_index_is_found(folder):
    (folder / "demo-000000.index.npz").unlink()
    (folder / "auto-000000.index.npz").write_bytes((folder / "auto-000001.index.npz").read_bytes())
    findings = verify_shards(folder)
    assert any(f.shard == "demo-000000.tar" and "missing" in f.what for f in findings)
    assert any(f.shard == "auto-000000.tar" and "crc32" in f.what for f in findings)


def test_an_index_that_lies_about_a_number_is_found(folder):
    path = folder / "demo-000000.index.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["num_valid"] = arrays["num_valid"] + 1
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    (finding,) = verify_shards(folder)
    assert finding.what == "its index disagrees with the tar in num_valid"


def test_counts_and_doubled_samples_are_found(folder):
    manifest = Manifest.load(folder)
    demo = manifest.counts["demo"].model_copy(update={"frames": 99})
    manifest.model_copy(update={"counts": {**manifest.counts, "demo": demo}}).save(folder)
    assert [finding.what for finding in verify_shards(folder)] == ["its counts are not those of the shards"]
    shard = manifest.shards[0]
    for name in (shard.name, ShardIndex.path_of(shard.name).name):
        (folder / name.replace("000000", "000007")).write_bytes((folder / name).read_bytes())
    again = shard.model_copy(update={"name": "demo-000007.tar"})
    manifest.model_copy(update={"shards": (*manifest.shards, again)}).save(folder)
    doubled = [finding for finding in verify_shards(folder) if finding.what == "in more than one shard"]
    assert len(doubled) == shard.num_samples


STATE = np.zeros(2, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"state.npy": npy_bytes(np.zeros(3, dtype=np.float32))}, "state.npy is float32 [3], expected float32 [2]"),
        ({"state.npy": npy_bytes(np.zeros(2))}, "state.npy is float64 [2], expected float32 [2]"),
        ({"state.npy": npy_bytes(STATE)[:-1]}, "state.npy: 7 bytes of data for shape [2] of float32"),
        ({"state.npy": npy_bytes(STATE * np.float32(np.nan))}, "state.npy is not finite"),
        ({"next_state.npy": None}, "next_state.npy is missing"),
        ({"actions.npy": npy_bytes(np.ones((4, 3), dtype=np.float32))}, "actions.npy is not zero after its 3 valid"),
        ({"top.jpg": b"x"}, "top.jpg: not a whole JPEG"),
        ({"top.jpg": encode_jpeg(np.zeros((8, 9, 3), dtype=np.uint8))}, "top.jpg is 9x8, not 16 px"),
        ({"top.jpg": None}, "no picture of any"),
        ({"top.next.jpg": None}, "top.next.jpg is missing"),
    ],
)
def test_faults_inside_a_sample(folder, changes, fault):
    # Frame 3 of a truncated episode of 6 frames: three actions left, a window of two.
    write(folder, [made_episode(name="new/0", num_frames=6, source="demo", outcome="truncated")], dataset="new")
    manifest = Manifest.load(folder)
    sample = next(s for s in read_back(folder) if s.record.episode == "new/0" and s.record.frame == 3)
    members = {name: data for name, data in {**sample.members, **changes}.items() if data is not None}
    faults = sample_faults(manifest, manifest.shards[-1], sample.record, members)
    assert len(faults) == 1 and faults[0].startswith(fault)


def test_a_record_that_does_not_belong_is_found(folder):
    manifest = Manifest.load(folder)
    sample = read_back(folder)[0]
    for changes, fault in (
        ({"source": "auto"}, "source is auto in a shard of demo"),
        ({"task": "other"}, "task 'other'"),
        ({"episode_length": 50}, "task 'sort' or its episode's length"),
        ({"fps": 30.0}, "next_offset or fps"),
    ):
        record = sample.record.model_copy(update=changes)
        assert any(
            what.startswith(fault) for what in sample_faults(manifest, manifest.shards[0], record, sample.members)
        )


def test_npy_reading_trusts_nothing():
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(npy_array(npy_bytes(array)), array)
    plain = npy_bytes(np.zeros(1))
    huge = plain.replace(b"(1,), }           ", b"(99999999999,), } ")
    torn = plain.replace(b"(1,), }", b"(1,((  ")
    assert len({len(plain), len(huge), len(torn)}) == 1 and len({plain, huge, torn}) == 3
    for data in (b"", b"\x93NUMPY", npy_bytes(array) + b"more", huge, torn):
        with pytest.raises(ValueError):
            npy_array(data)
    with pytest.raises(ValueError):
        npy_bytes(np.array([{}], dtype=object))


def test_a_long_key_is_written_so_that_everyone_can_read_it(tmp_path):
    record = SampleRecord(**RECORD)
    with TarWriter(tmp_path / "demo-000000.tar") as tar:
        tar.add("k" * 120, record, {"state.npy": npy_bytes(STATE)})
        written = tar.finish()
    with tarfile.open(tmp_path / "demo-000000.tar") as tar:
        assert sorted(tar.getnames()) == ["k" * 120 + ".json", "k" * 120 + ".state.npy"]
        offsets = {member.name.split(".", 1)[1]: member.offset_data for member in tar}
    assert dict(zip(written.index.suffixes.tolist(), written.index.offsets[0].tolist(), strict=True)) == offsets
