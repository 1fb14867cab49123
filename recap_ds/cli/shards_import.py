"""``recap-ds shards import SRC OUT --source ...``: a LeRobot data set becomes tagged shards.

Parses, builds and calls; what an import does stands in ``data/lerobot`` (reading) and ``data/writer.py`` (writing).
"""

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from recap_ds.cli.numbers import count, fraction, ranges, seed
from recap_ds.config import SOURCES
from recap_ds.errors import UsageError

if TYPE_CHECKING:
    from recap_ds.data.episodes import Episode
    from recap_ds.data.imports import ImportJob
    from recap_ds.data.lerobot.metadata import DatasetMetadata
    from recap_ds.data.lerobot.reader import ImportOptions
    from recap_ds.data.writer import Progress, WriteReport

# Decoding scales with cores; beyond this the disk is the limit.
MAX_DEFAULT_JOBS = 16
# OLD of a camera that a data set lacks.
NO_CAMERA = "none"
CAMERA_NAME = re.compile(r"[A-Za-z0-9_-]+")  # names of members in a tar, which split at dots


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "import",
        help="import a LeRobot data set",
        description="Write the LeRobot data set SRC (v3.0, v2.1) as shards into OUT, new or with shards already. Given "
        "again, it does nothing; interrupted, it goes on.",
    )
    parser.add_argument("src", metavar="SRC", help="folder that holds meta/, or OWNER/NAME[@REVISION] on the hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of shards")
    parser.add_argument("--source", choices=SOURCES, required=True, help="who produced the data")
    _add_reading(parser)
    _add_storing(parser)
    parser.set_defaults(run=run)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """What is taken from the data set."""
    parser.add_argument("--name", help="data set name in episode names (default: the folder's or hub name)")
    parser.add_argument(
        "--labels", type=Path, metavar="CSV", help="outcomes: episode_index and outcome (or success), over the columns"
    )
    parser.add_argument(
        "--success-progress",
        type=fraction,
        metavar="P",
        help="of sarm_progress.parquet: from which progress at the last frame on an episode succeeded",
    )
    parser.add_argument(
        "--skip-episodes", type=ranges, default=(), metavar="LIST", help="leave out these (3,17-19): broken ones, say"
    )
    parser.add_argument("--task", metavar="TEXT", help="the task of every episode, instead of what the data set says")
    parser.add_argument(
        "--camera",
        action="append",
        type=_camera,
        metavar="NEW=OLD",
        help="import this camera under the name NEW, and no camera not named so; NEW=none: the others of OUT have it, "
        "this data set lacks it",
    )
    parser.add_argument(
        "--state-keys",
        default="observation.state",
        metavar="A,B",
        help="columns of the state, concatenated in this order (default: %(default)s)",
    )
    parser.add_argument("--action-keys", default="action", metavar="A,B", help="of the actions (default: %(default)s)")
    parser.add_argument("--fps", type=float, metavar="F", help="resample to this rate, with --absolute-actions only")
    parser.add_argument(
        "--absolute-actions", action="store_true", help="actions are targets, not changes: frames may be dropped"
    )
    parser.add_argument(
        "--delta-actions",
        type=ranges,
        default=(),
        metavar="DIMS",
        help="store these dims of absolute actions (0-5 or 0,1,2) as changes: target minus state of the same frame",
    )


def _add_storing(parser: argparse.ArgumentParser) -> None:
    """How it is stored."""
    parser.add_argument(
        "--chunk-size",
        type=count,
        default=10,
        metavar="H",
        help="actions per sample and frames to the next observation (default: %(default)s)",
    )
    parser.add_argument(
        "--no-next", action="store_true", help="leave out next observations, for sets that never see IQL"
    )
    parser.add_argument(
        "--image-size",
        type=count,
        metavar="PIXELS",
        help="side of the stored square (default: that of OUT, if new the largest side there is)",
    )
    parser.add_argument(
        "--stride", type=count, default=1, metavar="K", help="start a sample at every K-th frame only (default: 1)"
    )
    parser.add_argument("--samples-per-shard", type=count, default=1024, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--jobs",
        type=count,
        default=_default_jobs(),
        metavar="N",
        help="processes for images (default: %(default)s)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the order of samples (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    try:
        # av is an extra: only this verb needs it.
        from recap_ds.data.lerobot.fingerprint import dataset_fingerprint
        from recap_ds.data.lerobot.hub import find_dataset
        from recap_ds.data.lerobot.metadata import load_metadata
        from recap_ds.data.lerobot.reader import ImportOptions, read_episodes
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "av":
            raise
        raise UsageError(f"shards import needs the package {error.name}: pip install 'recap_ds[lerobot]'") from None
    from recap_ds.data.writer import write_shards

    found = find_dataset(args.src)
    cameras, absent_cameras = _cameras(args.camera)
    metadata = load_metadata(found.root, cameras, args.skip_episodes)
    options = ImportOptions(
        source=args.source,
        name=_dataset_name(found.name if args.name is None else args.name),
        state_keys=tuple(args.state_keys.split(",")),
        action_keys=tuple(args.action_keys.split(",")),
        labels=args.labels,
        success_progress=args.success_progress,
        fps=args.fps,
        absolute_actions=args.absolute_actions,
        delta_dims=args.delta_actions,
        task=args.task,
    )
    image_size = args.image_size or _image_size(args.out, metadata)
    started_seconds = time.perf_counter()
    tally = Tally()
    with _progress_bars(len(metadata.episodes)) as progress, _told_to_stop():
        report = write_shards(
            args.out,
            tally.count(read_episodes(metadata, options)),
            dataset=options.name,
            action_width=args.chunk_size,
            td_horizon=args.chunk_size,
            image_size=image_size,
            absent_cameras=absent_cameras,
            store_next=not args.no_next,
            stride=args.stride,
            samples_per_shard=args.samples_per_shard,
            jobs=args.jobs,
            seed=args.seed,
            progress=progress,
            job={"files": dataset_fingerprint(metadata, args.labels), **_job(options, cameras, args.skip_episodes)},
        )
    if report.was_there:
        print(f"{options.name}: already in {args.out}, {report.num_samples} samples of {report.num_episodes} episodes")
        return 0
    seconds = time.perf_counter() - started_seconds
    for line in _summary(metadata, options, tally, report, image_size):
        print(line)
    print(
        f"wrote {report.num_samples} samples in {len(report.new_shards)} shards to {args.out}: {seconds:.1f} s, "
        f"{tally.num_frames / seconds:.0f} frames/s with --jobs {args.jobs}"
    )
    return 0


def _job(options: "ImportOptions", cameras: dict[str, str] | None, skip_episodes: tuple[int, ...]) -> "ImportJob":
    """What decides the shards, besides the files and how they are stored."""
    settings = {key: value for key, value in asdict(options).items() if key != "labels"}
    return {**settings, "cameras": cameras, "skip_episodes": skip_episodes}


@dataclass
class Tally:
    """What went by on the way to the writer."""

    num_frames: int = 0
    num_human_frames: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)

    def count(self, episodes: "Iterable[Episode]") -> "Iterator[Episode]":
        for episode in episodes:
            self.num_frames += episode.num_frames
            self.num_human_frames += 0 if episode.human is None else int(episode.human.sum())
            self.outcomes[episode.outcome] += 1
            self.tasks[episode.task] += 1
            yield episode


def _summary(
    metadata: "DatasetMetadata",
    options: "ImportOptions",
    tally: Tally,
    report: "WriteReport",
    image_size: int,
) -> Iterator[str]:
    from recap_ds.batch import OUTCOME_IDS

    if report.num_resumed:
        yield f"went on: pictures of {report.num_resumed} episodes were there from an interrupted import"
    human = f", {tally.num_human_frames} under human control" if options.source == "intervention" else ""
    fps = options.fps or metadata.fps
    yield f"{options.name}: {report.num_episodes} episodes, {tally.num_frames} frames at {fps:g} fps{human}"
    yield "outcomes: " + ", ".join(f"{tally.outcomes[name]} {name}" for name in OUTCOME_IDS if tally.outcomes[name])
    yield "tasks: " + ", ".join(f"{task} ({count})" for task, count in sorted(tally.tasks.items()))
    stored = ", ".join(f"{camera.name} {camera.width}x{camera.height}" for camera in metadata.cameras)
    yield f"images: {image_size} px squares from {stored}"
    for line in report.outliers:
        yield f"look at: {line}"
    if metadata.left_out_cameras:
        yield f"left out: {', '.join(metadata.left_out_cameras)}"


@contextmanager
def _progress_bars(num_episodes: int) -> "Iterator[Progress]":
    """One bar per phase on stderr; none where stderr is no terminal."""
    bars: dict[str, tqdm] = {}

    def show(phase: str, done: int, total: int | None) -> None:
        if phase not in bars:
            total = num_episodes if phase == "episodes" else total
            bars[phase] = tqdm(total=total, desc=phase, unit="", disable=None)
        bars[phase].update(done - bars[phase].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


@contextmanager
def _told_to_stop() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the pictures it has", file=sys.stderr)
        raise


def _image_size(out: Path, metadata: "DatasetMetadata") -> int:
    from recap_ds.data.manifest import MANIFEST_NAME, Manifest

    if (out / MANIFEST_NAME).exists():
        return Manifest.load(out).image_size
    return max(max(camera.height, camera.width) for camera in metadata.cameras)


def _dataset_name(name: str) -> str:
    if not name or "/" in name:
        raise UsageError(f"--name {name!r}: a data set's name is not empty and has no slash")
    return name


def _cameras(pairs: list[tuple[str, str]] | None) -> tuple[dict[str, str] | None, tuple[str, ...]]:
    """New name -> old, None for all there are; and the names of cameras this data set lacks."""
    pairs = pairs or []
    names = [new.lower() for new, _ in pairs]
    for new, _ in pairs:
        if names.count(new.lower()) > 1:
            raise UsageError(f"--camera {new}=...: is given twice; each camera has a name of its own")
    chosen = {new: old for new, old in pairs if old != NO_CAMERA}
    return chosen or None, tuple(new for new, old in pairs if old == NO_CAMERA)


def _default_jobs() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_DEFAULT_JOBS)


def _camera(text: str) -> tuple[str, str]:
    new, _, old = text.partition("=")
    if not CAMERA_NAME.fullmatch(new) or not old:
        raise argparse.ArgumentTypeError(f"{text!r} is not NEW=OLD, with letters, digits, '_' and '-' in NEW")
    return new, old
