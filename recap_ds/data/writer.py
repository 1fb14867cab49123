"""Episodes in, tagged shards out: the one place where the rules of the shard format are applied.

1. every episode is checked and the JPEGs of the frames it needs are spooled, in worker processes (``spool.py``);
2. the samples of each source are enumerated (``windows.py``) and shuffled once, with a seed;
3. tars are written from the spools, one source each (``tar.py``), and join the folder all at once (``staging.py``).

Memory holds states, actions and where the JPEGs lie, never pictures. W = action_width, A = action dims, S = state dims.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from recap_ds.batch import SOURCE_IDS
from recap_ds.config import SOURCES
from recap_ds.data.checks import check_outcomes_known
from recap_ds.data.episodes import Episode
from recap_ds.data.imports import ImportJob, ImportRecord, is_the_same, record_import
from recap_ds.data.index import SampleRecord, ShardIndex
from recap_ds.data.intake import Intake, StoredFormat, Take, check_format
from recap_ds.data.manifest import Manifest, ShardEntry
from recap_ds.data.npy import npy_bytes
from recap_ds.data.outliers import find_outliers
from recap_ds.data.spool import Spool, spool_episodes
from recap_ds.data.staging import Staging, open_staging
from recap_ds.data.stats import FeatureStats
from recap_ds.data.survey import count_sources, count_tasks
from recap_ds.data.tar import TarWriter
from recap_ds.errors import RunFailed, UsageError

# phase ("episodes" spooled or "samples" written), how many so far, of how many (None = not known).
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class WriteReport:
    manifest: Manifest
    new_shards: tuple[str, ...]
    num_episodes: int
    num_samples: int
    was_there: bool = False  # the same import was made before: nothing was done
    num_resumed: int = 0  # episodes whose pictures an interrupted attempt had left
    outliers: tuple[str, ...] = ()  # values to look at, in words


def write_shards(
    out: str | Path,
    episodes: Iterable[Episode],
    *,
    dataset: str,
    action_width: int,
    td_horizon: int,
    image_size: int,
    absent_cameras: tuple[str, ...] = (),
    store_next: bool = True,
    stride: int = 1,
    samples_per_shard: int = 1024,
    jobs: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
    job: ImportJob | None = None,
) -> WriteReport:
    """Write ``episodes`` (names ``<dataset>/<index>``) into the folder ``out``, new or holding other data sets.

    Nothing of ``out`` changes unless everything was written. ``stride`` thins sample starts only; actions, rewards and
    offsets stay at the native rate. ``absent_cameras``: those of the folder that these episodes lack. ``jobs`` worker
    processes decode and compress pictures. ``job``: what decides the shards besides these arguments; given again, a job
    that is done does nothing, and one that was interrupted goes on.
    """
    layout = StoredFormat(action_width, td_horizon, image_size, store_next, stride, samples_per_shard, absent_cameras)
    check_format(layout)
    report = progress or (lambda phase, done, total: None)
    if job is not None:
        job = {**asdict(layout), "seed": seed, **job}
    with open_staging(Path(out), job) as staging:
        done = staging.imports.get(dataset) if job is not None else None
        if done is not None and is_the_same(done, job, dataset, staging.folder):
            return _report_done(staging.manifest, done)
        with _told(staging.folder):
            return _write(staging, layout, episodes, dataset, jobs, seed, report, job)


def _write(
    staging: Staging,
    layout: StoredFormat,
    episodes: Iterable[Episode],
    dataset: str,
    jobs: int,
    seed: int,
    report: Progress,
    job: ImportJob | None,
) -> WriteReport:
    intake = Intake(staging, layout, dataset, resumable=job is not None)
    spools = {}
    for spool in spool_episodes(intake.jobs(episodes), jobs):
        intake.check_cameras(spool)
        spools[spool.number] = spool
        report("episodes", len(spools), None)
    check_outcomes_known(intake.unknown_outcomes)
    if not intake.takes:
        raise UsageError(f"{dataset}: no episodes to write")
    shards = _write_tars(staging, layout, intake.takes, spools, seed, report)
    manifest = _manifest(staging, intake, shards)
    entries = [entry for entry, _ in shards]
    record = {} if job is None else {dataset: record_import(job, len(intake.takes), entries)}
    staging.commit(manifest, [entry.name for entry in entries], record)
    return WriteReport(
        manifest,
        tuple(entry.name for entry in entries),
        num_episodes=len(intake.takes),
        num_samples=sum(entry.num_samples for entry in entries),
        num_resumed=sum(spool.made_before for spool in spools.values()),
        outliers=tuple(find_outliers(intake.takes)),
    )


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What the machine lacked, in a line: spools stay, and the same import goes on from them."""
    try:
        yield
    except BrokenProcessPool as error:
        raise RunFailed(
            f"{folder}: a process for images was killed, most likely for want of memory; start again with fewer --jobs"
        ) from error
    except OSError as error:
        raise RunFailed(f"{folder}: {error}; mend that and start again") from error


def _report_done(manifest: Manifest, record: ImportRecord) -> WriteReport:
    num_samples = sum(shard.num_samples for shard in manifest.shards if shard.name in record.shards)
    return WriteReport(manifest, tuple(record.shards), record.num_episodes, num_samples, was_there=True)


def sample_key(episode: str, frame: int) -> str:
    """Unique over all data sets, without dots or slashes: ``reach_demo-000003-00017``."""
    dataset, _, index = episode.partition("/")
    number = f"{int(index):06d}" if index.isdecimal() and index.isascii() else slug(index)
    return f"{slug(dataset)}-{number}-{frame:05d}"


def slug(name: str) -> str:
    """``name`` without dots, slashes and blanks: for keys and folders."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:40]
    # A name that had to change gets a checksum, so that "a.b" and "a_b" stay apart.
    return plain if plain == name else f"{plain}_{zlib.crc32(name.encode()):08x}"


def _write_tars(
    staging: Staging,
    layout: StoredFormat,
    takes: list[Take],
    spools: dict[int, Spool],
    seed: int,
    report: Progress,
) -> list[tuple[ShardEntry, ShardIndex]]:
    owner = np.repeat(np.arange(len(takes)), [len(take.source) for take in takes])
    row = np.concatenate([np.arange(len(take.source)) for take in takes])
    sources = np.concatenate([take.source for take in takes])
    shards, num_written = [], 0
    for source in SOURCES:
        chosen = np.flatnonzero(sources == SOURCE_IDS[source])
        # Philox keyed by (seed, source): each source's order is its own.
        generator = np.random.Generator(np.random.Philox(key=[seed, SOURCE_IDS[source]]))
        chosen = chosen[generator.permutation(len(chosen))]
        first = staging.next_number(source)
        # Shards of even size: a last one of three samples would be read three hundred times as often per byte.
        parts = np.array_split(chosen, -(-len(chosen) // layout.samples_per_shard)) if len(chosen) else []
        for number, part in enumerate(parts, start=first):
            name = f"{source}-{number:06d}.tar"
            with TarWriter(staging.work / name) as tar:
                for i in part.tolist():
                    take = takes[owner[i]]
                    tar.add(*_sample(take, int(row[i]), spools[int(owner[i])], layout))
                written = tar.finish()
            written.index.save(ShardIndex.path_of(staging.work / name))
            entry = ShardEntry(
                name=name, source=source, num_samples=len(part), bytes=written.bytes, sha256=written.sha256
            )
            shards.append((entry, written.index))
            num_written += len(part)
            report("samples", num_written, len(sources))
    return shards


def _sample(take: Take, row: int, spool: Spool, layout: StoredFormat) -> tuple[str, SampleRecord, dict[str, bytes]]:
    episode, arrays, windows = take.episode, take.arrays, take.windows
    frame, num_valid, next_offset = (
        int(values[row]) for values in (windows.frame, windows.num_valid, windows.next_offset)
    )
    record = SampleRecord(
        source=SOURCES[take.source[row]],
        task=episode.task,
        prompt=episode.prompt,
        episode=episode.name,
        frame=frame,
        episode_length=len(arrays.states),
        outcome=episode.outcome,
        control="human" if windows.human[row] else "policy",
        num_valid=num_valid,
        next_offset=next_offset,
        fps=episode.fps,
        origin=episode.origin,
    )
    reach = slice(frame, frame + min(num_valid, layout.action_width))
    members = {
        "state.npy": npy_bytes(arrays.states[frame]),
        "actions.npy": npy_bytes(_padded(arrays.actions[reach], layout.action_width)),
    }
    if arrays.rewards is not None:
        members["rewards.npy"] = npy_bytes(_padded(arrays.rewards[reach], layout.action_width))
    members |= {f"{camera}.jpg": jpeg for camera, jpeg in spool.read(frame).items()}
    if layout.store_next and windows.needs_next[row]:
        members["next_state.npy"] = npy_bytes(arrays.states[frame + next_offset])
        members |= {f"{camera}.next.jpg": jpeg for camera, jpeg in spool.read(frame + next_offset).items()}
    return sample_key(episode.name, frame), record, members


def _padded(rows: np.ndarray, width: int) -> np.ndarray:
    padded = np.zeros((width, *rows.shape[1:]), dtype=np.float32)
    padded[: len(rows)] = rows
    return padded


def _manifest(staging: Staging, intake: Intake, shards: list[tuple[ShardEntry, ShardIndex]]) -> Manifest:
    old = staging.manifest
    old_shards = old.shards if old else ()
    indices = [ShardIndex.load(ShardIndex.path_of(staging.folder / shard.name)) for shard in old_shards]
    indices += [index for _, index in shards]
    statistics = {}
    for source in SOURCES:
        before = old.statistics.get(source) if old else None
        now = _statistics(intake.takes, SOURCE_IDS[source])
        parts = [part for part in (before, now) if part]
        if parts:
            statistics[source] = {
                feature: FeatureStats.merge([part[feature] for part in parts]) for feature in ("state", "actions")
            }
    return Manifest(
        **intake.shared,
        has_rewards=(old is None or old.has_rewards) and all(take.arrays.rewards is not None for take in intake.takes),
        tasks=count_tasks(indices, intake.prompts, known=list(old.tasks) if old else []),
        counts=count_sources(indices),
        statistics=statistics,
        shards=(*old_shards, *(entry for entry, _ in shards)),
    )


def _statistics(takes: list[Take], source: int) -> dict[str, FeatureStats]:
    """Over the frames that are samples of ``source``; empty without any."""
    frames = [take.windows.frame[take.source == source] for take in takes]
    if not any(map(len, frames)):
        return {}
    columns = {
        "state": [take.arrays.states[rows] for take, rows in zip(takes, frames, strict=True)],
        "actions": [take.arrays.actions[rows] for take, rows in zip(takes, frames, strict=True)],
    }
    return {feature: FeatureStats.of(np.concatenate(parts)) for feature, parts in columns.items()}
