r"""Shards whose returns say nothing: the control that shows whether a value function's gates can fail.

Every frame keeps its episode, its place in it and its outcome, and so its return, but shows another frame's state,
pictures and actions: within a task, the frames' contents change places at random. Nothing that could be learned is
left but the mean return of the task, so a critic trained on it must be at chance on held-out episodes, per task: rank
correlation about 0, separation about 0.5, mean absolute error no better than the constant's, shuffled-image gap about
0. One that is not sees what it should not.

    python -m tests.shuffled_returns data/mine data/mine_shuffled
    deepspeed launch/train.py --deepspeed ds_configs/zero3.json --config launch/recipes/metaworld_critic.yaml \
        name=shuffled data.shards=data/mine_shuffled
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

from recap_ds.data.index import SampleRecord, parse_record
from recap_ds.data.manifest import MANIFEST_NAME, Manifest
from recap_ds.data.npy import npy_array, npy_bytes
from recap_ds.data.rebuild import rebuild
from recap_ds.data.shard_set import ShardSet
from recap_ds.data.tar import TarWriter

# What stays with the frame: where it is and what it earns. Everything else is what it shows.
KEPT = ("json", "rewards.npy")


def write_shuffled(source: str | Path, out: str | Path, seed: int = 0) -> Manifest:
    """``out``: a new folder."""
    shards, out = ShardSet.open(source), Path(out)
    out.mkdir(parents=True)
    shutil.copy(shards.folder / MANIFEST_NAME, out)  # rebuilding keeps its order of tasks and TD window
    shown = shuffle_within(shards.table.task, seed)
    for shard, entry in enumerate(shards.manifest.shards):
        with TarWriter(out / entry.name) as tar:
            for sample in range(shards.shard_starts[shard], shards.shard_starts[shard + 1]):
                own, other = shards.read_members(sample), shards.read_members(int(shown[sample]))
                # The key is as good as another: whoever reads the shards knows samples by episode and frame.
                key = f"{sample:09d}"
                record = parse_record(entry.name, key, own["json"])
                members = _contents(other, record)
                tar.add(key, record, members | {name: own[name] for name in KEPT[1:] if name in own})
            tar.finish()
    shards.close()
    return rebuild(out)


def shuffle_within(group: np.ndarray, seed: int) -> np.ndarray:
    """[N] for each sample, whose contents it is to show: a permutation within each group of ``group`` [N]."""
    generator, shown = np.random.default_rng(seed), np.empty(len(group), np.int64)
    for number in np.unique(group):
        mine = np.flatnonzero(group == number)
        shown[mine] = generator.permutation(mine)
    return shown


def _contents(members: dict[str, bytes], record: SampleRecord) -> dict[str, bytes]:
    """What a frame shows; with a next observation where its place needs one, its own where it has none to lend."""
    now = {name: data for name, data in members.items() if name not in KEPT and not _is_next(name)}
    actions = npy_array(now["actions.npy"]).copy()
    actions[record.num_valid :] = 0.0
    now["actions.npy"] = npy_bytes(actions)
    if not record.needs_next:
        return now
    return now | {_next_name(name): members.get(_next_name(name), now[name]) for name in now if name != "actions.npy"}


def _is_next(name: str) -> bool:
    return name == "next_state.npy" or name.endswith(".next.jpg")


def _next_name(name: str) -> str:
    return "next_state.npy" if name == "state.npy" else f"{name.removesuffix('.jpg')}.next.jpg"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.shuffled_returns", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of shards")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    manifest = write_shuffled(arguments.source, arguments.out, arguments.seed)
    print(f"{manifest.num_samples} samples with returns that say nothing: {arguments.out}")


if __name__ == "__main__":
    main()
