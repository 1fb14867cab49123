import io
import json
import tarfile
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from recap_ds.data import index as module
from recap_ds.data.index import SampleRecord, ShardIndex, build_index, parse_record
from recap_ds.errors import UsageError
from tests.data.made_episodes import made_episode, write

RECORD = {
    "source": "auto",
    "task": "sort",
    "prompt": "sort",
    "episode": "set/0",
    "frame": 2,
    "episode_length": 9,
    "outcome": "failure",
    "control": "policy",
    "num_valid": 5,
    "next_offset": 3,
    "fps": 10.0,
}


def json_bytes(**changes) -> bytes:
    return json.dumps({**RECORD, **changes}).encode()


def write_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def assert_same(a: ShardIndex, b: ShardIndex) -> None:
    for field in fields(ShardIndex):
        first, second = getattr(a, field.name), getattr(b, field.name)
        assert first.dtype == second.dtype, field.name
        np.testing.assert_array_equal(first, second, err_msg=field.name)


def test_building_from_the_tar_gives_what_the_writer_stored(tmp_path):
    human = np.array([0, 0, 0, 1, 1, 0, 1], dtype=bool)
    write(tmp_path, [made_episode(i, source="intervention", human=human) for i in range(3)], samples_per_shard=5)
    for shard in tmp_path.glob("*.tar"):
        assert_same(ShardIndex.load(ShardIndex.path_of(shard)), build_index(shard))


def test_places_and_checksums_are_those_of_the_bytes(tmp_path):
    write(tmp_path, [made_episode(outcome="unknown")])
    (shard,) = tmp_path.glob("*.tar")
    data, index = shard.read_bytes(), ShardIndex.load(ShardIndex.path_of(shard))
    suffixes = index.suffixes.tolist()
    assert suffixes == sorted(suffixes)
    for row, key in enumerate(index.keys):
        crc = 0
        for suffix, offset, size in zip(suffixes, index.offsets[row], index.sizes[row], strict=True):
            if offset < 0:
                assert index.next_offset[row] == 0 and "next" in suffix and size == -1
                continue
            member = data[offset : offset + size]
            crc = zlib.crc32(member, crc)
            if suffix == "json":
                record = json.loads(member)
        assert crc == index.crc32[row]
        assert key == f"set-000000-{record['frame']:05d}"
        assert (record["frame"], record["num_valid"]) == (index.frame[row], index.num_valid[row])
        assert index.tasks[index.task[row]] == "sort" and index.episodes[index.episode[row]] == "set/0"


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_foreign_tar_is_indexed_whatever_its_dialect_and_order(tmp_path, tar_format):
    first = [("a.top.jpg", b"picture"), ("a.json", json_bytes(note="more")), ("a.actions.npy", b"x" * 700)]
    long_key = "k" * (90 if tar_format == tarfile.USTAR_FORMAT else 150)
    path = write_tar(tmp_path / "auto-000000.tar", [*first, (f"{long_key}.json", json_bytes(frame=3))], tar_format)
    index = build_index(path)
    assert index.keys.tolist() == ["a", long_key]
    assert index.suffixes.tolist() == ["actions.npy", "json", "top.jpg"]
    assert index.crc32[0] == zlib.crc32(b"x" * 700 + first[1][1] + b"picture")
    assert (index.offsets[1] >= 0).tolist() == [False, True, False]
    place = slice(index.offsets[0, 2], index.offsets[0, 2] + index.sizes[0, 2])
    assert path.read_bytes()[place] == b"picture"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.json", json_bytes()), ("a.state.pyd", b"")], "pickle"),
        ([("a.json", json_bytes()), ("a.state.PICKLE", b"")], "pickle"),
        ([("a.json", json_bytes()), ("a.weights.pth", b"")], "pickle"),
        ([("a.json", json_bytes()), ("a.pkl", b"")], "pickle"),
        ([("b/a.json", json_bytes())], "is a path"),
        ([("/a.json", json_bytes())], "is a path"),
        ([("..json", json_bytes())], "is a path"),
        ([("a..json", json_bytes())], "is a path"),
        ([("b\\a.json", json_bytes())], "is a path"),
        ([("json", json_bytes())], "is not named"),
        ([(".json", json_bytes())], "is not named"),
        ([("a.b.json", json_bytes()), ("a.b.top.jpg", b"")], "has no a.json"),
        ([("a.json", json_bytes()), ("b.json", json_bytes()), ("a.top.jpg", b"")], "occurs twice"),
        ([("a.json", json_bytes()), ("a.json", json_bytes())], "there twice"),
        ([("a.json", b"{")], "is not JSON"),
        ([("a.json", b"[" * 100_000)], "is not JSON"),
        ([("a.json", json_bytes(source="demos"))], "source"),
        ([("a.json", json_bytes(frame=-1))], "frame"),
        ([("a.json", json_bytes(num_valid=8))], "do not fit"),
        ([("a.json", json_bytes(next_offset=6))], "do not fit"),
    ],
)
def test_what_does_not_conform_is_refused_with_the_member(tmp_path, members, message):
    path = write_tar(tmp_path / "auto-000000.tar", members)
    with pytest.raises(UsageError, match=message) as caught:
        build_index(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_folders_and_devices_are_refused(tmp_path, kind):
    path = tmp_path / "auto-000000.tar"
    with tarfile.open(path, "w") as tar:
        header = tarfile.TarInfo("a.json")
        header.type, header.linkname = kind, "/etc/hostname"
        tar.addfile(header)
    with pytest.raises(UsageError, match="not a plain file"):
        build_index(path)


def test_sizes_and_counts_are_bounded(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [("a.json", json_bytes()), ("a.x.bin", b"12345"), ("b.json", json_bytes())])
    for name, limit in (("MAX_MEMBER_BYTES", 4), ("MAX_MEMBERS_PER_SAMPLE", 1), ("MAX_SAMPLES_PER_SHARD", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, limit)
            with pytest.raises(UsageError):
                build_index(path)
    assert build_index(path).num_samples == 2


def test_a_tar_cut_short_or_compressed_is_refused(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [(f"{i}.json", json_bytes()) for i in range(30)])
    data = whole.read_bytes()
    for length in (0, 100, 700, 1024, 5 * 1024, 5 * 1024 + 600):
        whole.write_bytes(data[:length])
        with pytest.raises(UsageError, match="tar"):
            build_index(whole)
    # A damaged header in the middle is not the end.
    whole.write_bytes(data[: 10 * 1024] + b"\xff" * 512 + data[10 * 1024 + 512 :])
    with pytest.raises(UsageError, match="damaged at byte 10240"):
        build_index(whole)
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.json"))
    with pytest.raises(UsageError, match="plain tar"):
        build_index(tmp_path / "b.tar")


def test_a_stored_index_that_is_damaged_says_how_to_mend_it(tmp_path):
    write(tmp_path, [made_episode()])
    path = tmp_path / "demo-000000.index.npz"
    data = path.read_bytes()
    for broken in (b"", b"not a zip", data[: len(data) // 2], data[:2000] + b"\xff" * 50 + data[2050:]):
        path.write_bytes(broken)
        with pytest.raises(UsageError, match="rebuild it with 'recap-ds shards index"):
            ShardIndex.load(path)
    path.unlink()
    with pytest.raises(UsageError, match="missing"):
        ShardIndex.load(path)
    with open(path, "wb") as file:
        np.savez(file, version=np.int64(2))
    with pytest.raises(UsageError, match="index version 2"):
        ShardIndex.load(path)
    with open(path, "wb") as file:  # what would need pickle is refused, not loaded
        np.savez(file, version=np.array([{}], dtype=object))
    with pytest.raises(UsageError, match="damaged"):
        ShardIndex.load(path)


@pytest.mark.parametrize(
    ("changes", "needs_next"),
    [
        ({}, True),
        ({"next_offset": 0}, False),
        ({"frame": 6, "num_valid": 3, "next_offset": 3}, False),
        ({"frame": 6, "num_valid": 3, "next_offset": 2, "outcome": "truncated"}, True),
    ],
)
def test_a_next_observation_is_needed_unless_the_task_ends_in_the_window(changes, needs_next):
    assert parse_record("shard", "key", json_bytes(**changes)).needs_next == needs_next
    assert SampleRecord(**{**RECORD, **changes}).needs_next == needs_next
