"""The index beside each tar: every member's place and every sample's numbers, without reading the tar.

``demo-000000.tar`` has ``demo-000000.index.npz``: plain numpy arrays (never pickle) over n samples and M member
suffixes. The writer makes it while writing; ``build_index`` makes the same one from any plain WebDataset tar whose
samples carry the JSON record below. What it refuses: members that would need pickle, paths, links, devices, sparse or
huge members.
"""

import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from recap_ds.batch import CONTROL_IDS, OUTCOME_IDS, SOURCE_IDS
from recap_ds.config import SourceName
from recap_ds.data.npy import npz_arrays
from recap_ds.errors import UsageError
from recap_ds.files.atomic import write_file

INDEX_VERSION = 1
SHARD_NAME = re.compile(r"(demo|auto|intervention)-(\d{6,})\.tar")
PICKLE_SUFFIXES = ("pyd", "pickle", "pkl", "pth", "pt")
MAX_MEMBER_BYTES = 64 * 2**20
MAX_MEMBERS_PER_SAMPLE = 64
MAX_SAMPLES_PER_SHARD = 2**20


class SampleRecord(BaseModel):
    """``<key>.json``. Other fields may stand beside these; they are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    source: SourceName
    task: str
    prompt: str
    episode: str  # "<data set>/<index>"
    frame: int = Field(ge=0)
    episode_length: int = Field(ge=1)
    outcome: Literal["success", "failure", "truncated", "unknown"]  # of the whole episode
    control: Literal["policy", "human"]  # of this frame
    # Actions from this frame on until the episode ends or control changes hands; NOT capped by the stored width W.
    num_valid: int = Field(ge=1)
    # k of the TD window; 0 where there is none.
    next_offset: int = Field(ge=0)
    fps: float = Field(gt=0)
    origin: str = ""

    @model_validator(mode="after")
    def _inside_the_episode(self) -> "SampleRecord":
        if self.frame + self.num_valid > self.episode_length or self.next_offset > self.num_valid:
            raise ValueError(
                f"frame {self.frame}, num_valid {self.num_valid} and next_offset {self.next_offset} do not fit an "
                f"episode of {self.episode_length} frames"
            )
        return self

    @property
    def needs_next(self) -> bool:
        """False where the TD window is empty or reaches the end of the task."""
        ends_task = self.outcome in ("success", "failure") and self.frame + self.next_offset == self.episode_length
        return self.next_offset > 0 and not ends_task


@dataclass(frozen=True)
class ShardIndex:
    """Row i is sample i of the tar, in tar order; ids are those of ``recap_ds.batch``."""

    keys: np.ndarray  # [n] str
    suffixes: np.ndarray  # [M] str, sorted: "actions.npy", "json", "top.jpg", "top.next.jpg", ...
    offsets: np.ndarray  # [n, M] int64, first byte of the member's data in the tar; -1 = the sample lacks it
    sizes: np.ndarray  # [n, M] int64, bytes; -1 = the sample lacks it
    crc32: np.ndarray  # [n] uint32, over the bytes of the sample's members in the order of ``suffixes``
    source: np.ndarray  # [n] int8
    tasks: np.ndarray  # [num_tasks] str, sorted
    task: np.ndarray  # [n] int32, into ``tasks`` of this shard
    episodes: np.ndarray  # [num_episodes] str, sorted
    episode: np.ndarray  # [n] int32, into ``episodes`` of this shard
    frame: np.ndarray  # [n] int32
    episode_length: np.ndarray  # [n] int32
    outcome: np.ndarray  # [n] int8
    control: np.ndarray  # [n] int8
    num_valid: np.ndarray  # [n] int32, not capped by the stored width W
    next_offset: np.ndarray  # [n] int32

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    @staticmethod
    def path_of(tar_path: str | Path) -> Path:
        return Path(tar_path).with_suffix(".index.npz")

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        np.savez(buffer, version=np.int64(INDEX_VERSION), **arrays)
        return buffer.getvalue()

    def save(self, path: str | Path) -> None:
        write_file(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> "ShardIndex":
        mend = "rebuild it with 'recap-ds shards index FOLDER'"
        try:
            stored = npz_arrays(Path(path))
        except FileNotFoundError:
            raise UsageError(f"{path}: missing; {mend}") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: damaged ({error}); {mend}") from None
        version = stored.pop("version", None)
        if version is None or version.tolist() != INDEX_VERSION:
            raise UsageError(f"{path}: index version {version}, not {INDEX_VERSION}; {mend}")
        if stored.keys() != {field.name for field in fields(cls)}:
            raise UsageError(f"{path}: damaged (it holds other arrays); {mend}")
        index = cls(**stored)
        rows = [getattr(index, field.name) for field in fields(cls) if field.name not in _TABLE_FIELDS]
        table = (index.num_samples, len(index.suffixes))
        if {len(column) for column in rows} != {table[0]} or {index.offsets.shape, index.sizes.shape} != {table}:
            raise UsageError(f"{path}: damaged (its arrays disagree in shape); {mend}")
        if not index._is_possible():
            raise UsageError(f"{path}: damaged (it holds impossible numbers); {mend}")
        return index

    def _is_possible(self) -> bool:
        """Nothing here is trusted to be in a table or in memory; whether it is true, each sample's crc32 tells."""
        names = (self.keys, *(getattr(self, name) for name in _TABLE_FIELDS))
        numbers = [getattr(self, field.name) for field in fields(self) if field.name not in ("keys", *_TABLE_FIELDS)]
        if any(column.dtype.kind != "U" for column in names) or any(array.dtype.kind not in "iu" for array in numbers):
            return False
        if self.num_samples == 0:
            return True
        is_there = self.sizes >= 0
        ids = (
            (self.task, len(self.tasks)),
            (self.episode, len(self.episodes)),
            (self.source, len(SOURCE_IDS)),
            (self.outcome, len(OUTCOME_IDS)),
            (self.control, len(CONTROL_IDS)),
        )
        counts = (self.frame, self.num_valid, self.next_offset, self.episode_length)
        return (
            all(column.min() >= 0 and column.max() < length for column, length in ids)
            and all(column.min() >= 0 and column.max() < 2**31 for column in counts)
            and bool(is_there.any(axis=1).all() and (is_there == (self.offsets >= 0)).all())
            and len(self.suffixes) <= MAX_MEMBERS_PER_SAMPLE
            and int(self.sizes.max()) <= MAX_MEMBER_BYTES
            and int(self.offsets.max()) < 2**62
        )


_TABLE_FIELDS = ("suffixes", "tasks", "episodes")


class IndexBuilder:
    """Collects samples one by one; the writer and ``build_index`` share it, so that both give the same index."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._records: list[SampleRecord] = []
        self._members: list[dict[str, tuple[int, int]]] = []
        self._crcs: list[int] = []

    def add(self, key: str, record: SampleRecord, places: dict[str, tuple[int, int]], crc: int) -> None:
        """``places``: suffix -> (offset, size); ``crc``: of the members' bytes, suffixes sorted."""
        self._keys.append(key)
        self._records.append(record)
        self._members.append(places)
        self._crcs.append(crc)

    def build(self) -> ShardIndex:
        records = self._records
        suffixes = sorted({suffix for places in self._members for suffix in places})
        places = [[member.get(suffix, (-1, -1)) for suffix in suffixes] for member in self._members]
        table = np.array(places, dtype=np.int64).reshape(len(records), len(suffixes), 2)
        tasks, task = np.unique(np.array([record.task for record in records], dtype=np.str_), return_inverse=True)
        names, episode = np.unique(np.array([record.episode for record in records], dtype=np.str_), return_inverse=True)
        return ShardIndex(
            keys=np.array(self._keys, dtype=np.str_),
            suffixes=np.array(suffixes, dtype=np.str_),
            offsets=table[:, :, 0].copy(),
            sizes=table[:, :, 1].copy(),
            crc32=np.array(self._crcs, dtype=np.uint32),
            source=np.array([SOURCE_IDS[record.source] for record in records], dtype=np.int8),
            tasks=tasks,
            task=task.astype(np.int32),
            episodes=names,
            episode=episode.astype(np.int32),
            frame=np.array([record.frame for record in records], dtype=np.int32),
            episode_length=np.array([record.episode_length for record in records], dtype=np.int32),
            outcome=np.array([OUTCOME_IDS[record.outcome] for record in records], dtype=np.int8),
            control=np.array([CONTROL_IDS[record.control] for record in records], dtype=np.int8),
            num_valid=np.array([record.num_valid for record in records], dtype=np.int32),
            next_offset=np.array([record.next_offset for record in records], dtype=np.int32),
        )


def build_index(tar_path: str | Path) -> ShardIndex:
    """One pass over a plain tar. UsageError, naming the member, for anything that does not conform."""
    builder = IndexBuilder()
    for key, record, members, places in read_samples(tar_path):
        builder.add(key, record, places, members_crc(members))
    return builder.build()


def members_crc(members: dict[str, bytes]) -> int:
    """crc32 over all members' bytes, suffixes sorted."""
    crc = 0
    for suffix in sorted(members):
        crc = zlib.crc32(members[suffix], crc)
    return crc


def read_samples(tar_path: str | Path) -> Iterator[tuple[str, SampleRecord, dict[str, bytes], dict]]:
    """(key, record, suffix -> bytes, suffix -> (offset, size)) of every sample, in tar order."""
    seen: set[str] = set()
    key, members, places = None, {}, {}
    for member_key, suffix, place, data in _read_members(Path(tar_path)):
        if member_key != key:
            if key is not None:
                yield key, _record(tar_path, key, members), members, places
            if member_key in seen:
                raise UsageError(f"{tar_path}: sample '{member_key}' occurs twice; members of a sample stand together")
            if len(seen) == MAX_SAMPLES_PER_SHARD:
                raise UsageError(f"{tar_path}: more than {MAX_SAMPLES_PER_SHARD} samples; write smaller shards")
            seen.add(member_key)
            key, members, places = member_key, {}, {}
        if suffix in members or len(members) == MAX_MEMBERS_PER_SAMPLE:
            raise UsageError(f"{tar_path}: '{key}.{suffix}' is there twice or the sample has too many members")
        members[suffix], places[suffix] = data, place
    if key is not None:
        yield key, _record(tar_path, key, members), members, places


def _read_members(path: Path) -> Iterator[tuple[str, str, tuple[int, int], bytes]]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, suffix = _check_member(path, member)
                data = tar.extractfile(member).read()
                if len(data) != member.size:
                    raise UsageError(f"{path}: '{member.name}' is cut short; copy the shard again")
                yield key, suffix, (member.offset_data, member.size), data
                tar.members = []  # tarfile remembers every header: a leak over a large shard
            # tarfile takes a damaged header for the end; the real end is a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UsageError(f"{path}: cut short or damaged at byte {tar.offset}; copy the shard again")
    except UsageError:
        raise
    # The last two: tarfile asks for as many bytes as a header of a long name claims.
    except (OSError, tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        raise UsageError(f"{path}: not a readable plain tar ({error})") from None


def _check_member(path: Path, member: tarfile.TarInfo) -> tuple[str, str]:
    name = member.name
    if not member.isreg() or member.issparse():
        raise UsageError(f"{path}: '{name}' is not a plain file (links, folders and devices are refused)")
    if "/" in name or "\\" in name or ".." in name or not name.isprintable():
        raise UsageError(f"{path}: '{name}' is a path; members are named <key>.<suffix>")
    key, _, suffix = name.partition(".")
    if not key or not suffix:
        raise UsageError(f"{path}: '{name}' is not named <key>.<suffix>")
    if suffix.rsplit(".", 1)[-1].lower() in PICKLE_SUFFIXES:
        raise UsageError(f"{path}: '{name}' would need pickle, which can run code; store .npy, .json or .jpg instead")
    if member.size > MAX_MEMBER_BYTES:
        raise UsageError(f"{path}: '{name}' has {member.size} bytes, more than the {MAX_MEMBER_BYTES} allowed")
    return key, suffix


def _record(path: str | Path, key: str, members: dict[str, bytes]) -> SampleRecord:
    if "json" not in members:
        raise UsageError(f"{path}: sample '{key}' has no {key}.json (a key may not contain dots)")
    return parse_record(path, key, members["json"])


def parse_record(path: str | Path, key: str, data: bytes) -> SampleRecord:
    try:
        return SampleRecord.model_validate(json.loads(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "record"
        raise UsageError(f"{path}: {key}.json: {place}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {key}.json is not JSON ({error})") from None
