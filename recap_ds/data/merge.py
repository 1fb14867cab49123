"""Several shard folders become one: ``recap-ds shards merge SRC... OUT``.

Tars are copied as they are and renumbered, checked against their checksums on the way. Counts come from the indices,
statistics merge from the manifests', as if everything had been imported into one folder. Labels and values stay behind:
they are of one manifest.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recap_ds.config import SOURCES
from recap_ds.data.imports import ImportRecord, load_imports
from recap_ds.data.index import ShardIndex
from recap_ds.data.manifest import Manifest, ShardEntry, check_agreement
from recap_ds.data.staging import Staging, open_staging
from recap_ds.data.stats import FeatureStats
from recap_ds.data.survey import count_sources, count_tasks
from recap_ds.errors import UsageError

SHARED_KEYS = (
    "cameras",
    "state_dim",
    "action_dim",
    "action_width",
    "fps",
    "td_horizon",
    "image_size",
    "has_next",
)
COPY_BLOCK_BYTES = 2**22


@dataclass(frozen=True)
class _Part:
    """One folder that takes part; OUT itself is the first where it holds shards already."""

    folder: Path
    manifest: Manifest
    indices: tuple[ShardIndex, ...]


def merge_shards(folders: Sequence[Path], out: Path) -> Manifest:
    """OUT is new, or holds shards that the others join."""
    resolved = [folder.resolve() for folder in (*folders, out)]
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise UsageError(f"{folder}: is named twice; a folder is merged once, and not into itself")
    added = [_load_part(folder) for folder in folders]
    with open_staging(out) as staging:
        parts = added
        if staging.manifest is not None:
            parts = [_load_part(out), *added]
        _check(parts)
        renamed = _rename(staging, added)
        shards = [
            _copy(part.folder, entry, index, staging.work, name)
            for part, names in zip(added, renamed, strict=True)
            for entry, index, name in zip(part.manifest.shards, part.indices, names, strict=True)
        ]
        manifest = _manifest(parts, (*(staging.manifest.shards if staging.manifest else ()), *shards))
        staging.commit(manifest, [shard.name for shard in shards], _imports(staging, added, renamed))
    return manifest


def _load_part(folder: Path) -> _Part:
    manifest = Manifest.load(folder)
    indices = tuple(ShardIndex.load(ShardIndex.path_of(folder / shard.name)) for shard in manifest.shards)
    return _Part(folder, manifest, indices)


def _check(parts: list[_Part]) -> None:
    """All of one form, no task under two prompts, no sample twice."""
    first = parts[0]
    owners: dict[str, list[_Part]] = {}
    for part in parts:
        form = {key: getattr(part.manifest, key) for key in SHARED_KEYS}
        check_agreement(first.folder, first.manifest, form, where=part.folder, mend="merge folders of one form")
        for name, task in part.manifest.tasks.items():
            for other in parts:
                if name in other.manifest.tasks and other.manifest.tasks[name].prompt != task.prompt:
                    raise UsageError(f"{part.folder}: task '{name}' has another prompt than in {other.folder}")
        for episode in {name for index in part.indices for name in index.episodes.tolist()}:
            owners.setdefault(episode, []).append(part)
    for episode, several in sorted((name, found) for name, found in owners.items() if len(found) > 1):
        # Folders may share an episode: its human frames here, the policy's there.
        frames = np.concatenate([_frames(part, episode) for part in several])
        if len(np.unique(frames)) < len(frames):
            raise UsageError(
                f"{several[1].folder}: episode {episode} is in {several[0].folder} as well; a data set is merged once: "
                f"import one of them under another name"
            )


def _frames(part: _Part, episode: str) -> np.ndarray:
    """Frames of an episode that are samples of the part."""
    return np.concatenate([index.frame[index.episodes[index.episode] == episode] for index in part.indices])


def _rename(staging: Staging, parts: list[_Part]) -> list[list[str]]:
    """New name of every part's shards, numbered on from what OUT holds."""
    number = {source: staging.next_number(source) for source in SOURCES}
    renamed = []
    for part in parts:
        names = []
        for shard in part.manifest.shards:
            names.append(f"{shard.source}-{number[shard.source]:06d}.tar")
            number[shard.source] += 1
        renamed.append(names)
    return renamed


def _copy(folder: Path, entry: ShardEntry, index: ShardIndex, work: Path, name: str) -> ShardEntry:
    digest, path = hashlib.sha256(), folder / entry.name
    try:
        with path.open("rb") as source, (work / name).open("wb") as target:
            while block := source.read(COPY_BLOCK_BYTES):
                digest.update(block)
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
    except FileNotFoundError:
        raise UsageError(f"{path}: missing; copy it again or run 'recap-ds shards index {folder}'") from None
    if digest.hexdigest() != entry.sha256:
        raise UsageError(f"{path}: is not what its manifest lists; see 'recap-ds shards verify {folder}'")
    index.save(ShardIndex.path_of(work / name))
    return entry.model_copy(update={"name": name})


def _manifest(parts: list[_Part], shards: tuple[ShardEntry, ...]) -> Manifest:
    manifests = [part.manifest for part in parts]
    indices = [index for part in parts for index in part.indices]
    statistics = {}
    for source in SOURCES:
        mine = [manifest.statistics[source] for manifest in manifests if source in manifest.statistics]
        if mine:
            statistics[source] = {
                feature: FeatureStats.merge([part[feature] for part in mine]) for feature in ("state", "actions")
            }
    prompts = {name: task.prompt for manifest in manifests for name, task in manifest.tasks.items()}
    return Manifest(
        **{key: getattr(manifests[0], key) for key in SHARED_KEYS},
        has_rewards=all(manifest.has_rewards for manifest in manifests),
        # Tasks keep their order, the first folder's before the next one's.
        tasks=count_tasks(indices, prompts, known=list(prompts)),
        counts=count_sources(indices),
        statistics=statistics,
        shards=shards,
    )


def _imports(staging: Staging, parts: list[_Part], renamed: list[list[str]]) -> dict[str, ImportRecord]:
    """What is known of the parts' imports, under the new names; a data set of two folders is not known as a whole."""
    imports: dict[str, ImportRecord] = {}
    several = set(staging.imports)
    for part, names in zip(parts, renamed, strict=True):
        new_name = dict(zip((shard.name for shard in part.manifest.shards), names, strict=True))
        for dataset, record in load_imports(part.folder, part.manifest).items():
            if dataset in imports:
                several.add(dataset)
            shards = {new_name[name]: sha256 for name, sha256 in record.shards.items()}
            imports[dataset] = record.model_copy(update={"shards": shards})
    return {dataset: record for dataset, record in imports.items() if dataset not in several}
