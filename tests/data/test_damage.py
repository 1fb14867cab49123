"""What damage may do to a shard set is little; tests/data/fuzz_damage.py says what, and tries more of it."""

import io
import tarfile
import zipfile

import numpy as np
import pytest

from recap_ds.config import DataConfig
from recap_ds.data.index import ShardIndex, build_index
from recap_ds.data.npy import npy_array, npy_bytes, npz_arrays
from recap_ds.data.shard_set import DamagedSample, ShardSet
from recap_ds.errors import UsageError
from tests.data.fuzz_damage import fuzz
from tests.data.tiny_shards import flat_episode, write_tiny


def test_random_damage_gives_no_wrong_sample(tmp_path):
    outcomes = fuzz(tmp_path / "shards", range(30))
    assert outcomes.total() == 30 and min(outcomes[kind] for kind in ("refused", "damaged samples", "harmless")) >= 3


def test_a_few_missing_shards_are_damage_and_many_are_refused(tmp_path):
    manifest = write_tiny(tmp_path, [flat_episode(i, 10) for i in range(5)], samples_per_shard=10).manifest
    (tmp_path / "demo-000003.tar").unlink()
    with pytest.raises(UsageError, match=r"demo-000003.tar: missing, .* 10 of 50 samples, more than .*=0\.001"):
        ShardSet.open(tmp_path)
    shard_set = ShardSet.open(tmp_path, DataConfig(max_damaged_fraction=0.2))
    assert shard_set.num_samples == manifest.num_samples == 50
    shard_set.read_members(29)
    for sample in (30, 39):
        with pytest.raises(DamagedSample, match=r"demo-000003\.tar: .* cannot be read \(No such file"):
            shard_set.read_members(sample)


@pytest.mark.parametrize(
    "changes",
    [
        {"source": 3},
        {"outcome": -1},
        {"task": 1},
        {"episode": 2**31 - 1},
        {"control": 2},
        {"frame": -1},
        {"num_valid": 2**40},
        {"sizes": 2**26 + 1},
        {"sizes": -1},
        {"offsets": -1},
        {"offsets": 2**62},
        {"crc32": np.float32(1)},
        {"keys": 7},
    ],
)
def test_an_index_of_impossible_numbers_is_refused(tmp_path, changes):
    write_tiny(tmp_path, [flat_episode(0, 5)])
    path = tmp_path / "demo-000000.index.npz"
    arrays = npz_arrays(path)
    for name, value in changes.items():
        arrays[name] = np.full(arrays[name].shape, value)
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(UsageError, match=r"damaged \(it holds impossible numbers\); rebuild it with"):
        ShardIndex.load(path)


def test_an_archive_that_would_grow_is_not_unpacked(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy_bytes(np.zeros(10_000_000)))
    with pytest.raises(ValueError, match="is compressed"):
        npz_arrays(path)


def test_what_is_said_of_damage_is_one_short_line(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a\nb\x1b[2J" + 300 * "c", npy_bytes(np.zeros(1)))
    data = path.read_bytes()
    path.write_bytes(data[:30] + b"x" + data[31:])  # the name at the member is not the one in the list
    long_header = npy_bytes(np.zeros(1)).replace(b"v\x00", b"\xff\xff", 1) + b" " * 70_000
    for read in (lambda: npz_arrays(path), lambda: npy_array(long_header)):
        with pytest.raises(ValueError) as caught:
            read()
        assert str(caught.value).isprintable() and len(str(caught.value)) < 150


@pytest.mark.parametrize("size", [2**62, 2**40, -512])
def test_a_long_name_that_is_too_long_is_refused(tmp_path, size):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, size
    buffer = io.BytesIO(header.tobuf(tarfile.GNU_FORMAT))
    path = tmp_path / "demo-000000.tar"
    path.write_bytes(buffer.getvalue() + bytes(2048))
    with pytest.raises(UsageError, match=r"demo-000000\.tar: "):
        build_index(path)
