"""Random damage to a shard set, case by case: python -m tests.data.fuzz_damage --cases 1000 [--seed 0]

Every case damages one file of a sound set: bits flipped, bytes changed or zeroed, the end cut off or something added,
a block moved, the file gone. What may come of it: one clear line before anything is read; or every sample is the one
that was written, byte for byte, or is known to be damaged, and so is every batch. What may not: another exception, a
hang, a wrong sample, or damage that ``recap-ds shards verify`` does not see.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from recap_ds.data.shard_set import DamagedSample, ShardSet
from recap_ds.data.verify import verify_shards
from recap_ds.errors import UsageError
from tests.data.test_loader import dataset_of, leaves
from tests.data.tiny_shards import flat_episode, tiny_config, write_tiny

MAX_SECONDS = 30
NUM_SLOTS = 16
CONFIG = tiny_config(data={"max_damaged_fraction": 1.0})


def damaged(data: bytes, draw: np.random.Generator) -> bytes | None:
    """The file's new bytes, not the old ones; None = the file is gone."""
    changed = bytearray(data)
    place = int(draw.integers(len(data)))
    length = min(int(2 ** draw.uniform(0, 12)), len(data) - place)
    match draw.choice(
        ["bits", "bytes", "zeros", "cut", "longer", "moved", "gone"], p=[0.4, 0.2, 0.1, 0.15, 0.05, 0.08, 0.02]
    ):
        case "bits":
            for spot in draw.integers(len(data), size=int(draw.integers(1, 9))):
                changed[spot] ^= 1 << int(draw.integers(8))
        case "bytes":
            changed[place : place + length] = draw.bytes(length)
        case "zeros":
            changed[place : place + length] = bytes(length)
        case "cut":
            del changed[place:]
        case "longer":
            changed += draw.bytes(length)
        case "moved":
            block = changed[place : place + length]
            del changed[place : place + length]
            spot = int(draw.integers(len(changed) + 1))
            changed[spot:spot] = block
        case "gone":
            return None
    if changed == data:
        changed[place] ^= 1
    return bytes(changed)


class Fuzz:
    def __init__(self, folder: Path):
        episodes = [flat_episode(i, 6 + i, task=("cube", "cup")[i % 2]) for i in range(4)]
        episodes += [flat_episode(i, 7, source="auto", outcome=("failure", "success")[i % 2]) for i in range(4)]
        episodes += [flat_episode(0, 8, source="intervention", human=slice(3, 8))]
        write_tiny(folder, episodes, samples_per_shard=10)
        self.folder = folder
        self.files = sorted(path for path in folder.iterdir() if path.suffix in (".tar", ".npz", ".json"))
        sound = ShardSet.open(folder)
        self.table = sound.table
        self.members = [sound.read_members(sample) for sample in range(sound.num_samples)]
        self.batch = dataset_of(sound, CONFIG).batch(np.arange(NUM_SLOTS))
        assert verify_shards(folder) == [] and not self.batch.replaced.any()

    def case(self, seed: int) -> str:
        """What came of one case; AssertionError, or whatever was raised, where it may not."""
        draw = np.random.default_rng(seed)
        path = self.files[int(draw.integers(len(self.files)))]
        data = path.read_bytes()
        new = damaged(data, draw)
        signal.alarm(MAX_SECONDS)
        try:
            if new is None:
                path.unlink()
            else:
                path.write_bytes(new)
            is_seen, outcome = self._verify(), self._read()
            assert is_seen or outcome == "harmless", f"{path.name}: verify did not see it"
            return outcome
        finally:
            signal.alarm(0)
            path.write_bytes(data)

    def _verify(self) -> bool:
        """True = it found something."""
        try:
            findings = verify_shards(self.folder)
        except UsageError as error:
            findings = [error]
        assert not any("\n" in str(finding) for finding in findings)
        return bool(findings)

    def _read(self) -> str:
        try:
            shard_set = ShardSet.open(self.folder, CONFIG.data)
        except UsageError as error:
            assert "\n" not in str(error)
            return "refused"
        for mine, wanted in zip(shard_set.table, self.table, strict=True):
            assert np.array_equal(mine, wanted), "the numbers of a sample are others"
        num_damaged = 0
        for sample, wanted in enumerate(self.members):
            try:
                assert shard_set.read_members(sample) == wanted, f"sample {sample} is another one"
            except DamagedSample:
                num_damaged += 1
        dataset = dataset_of(shard_set, CONFIG)
        try:
            batch = dataset.batch(np.arange(NUM_SLOTS))
        except UsageError as error:
            assert "no sound sample" in str(error)
            return "too much"
        sound = ~batch.replaced
        for mine, wanted in zip(leaves(batch), leaves(self.batch), strict=True):
            if mine.dtype != torch.bool or mine.shape != sound.shape or not torch.equal(mine, batch.replaced):
                assert torch.equal(mine[sound], wanted[sound]), "a batch is another one"
        shard_set.close()
        return "damaged samples" if num_damaged else "harmless"


def fuzz(folder: Path, seeds: range) -> Counter[str]:
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    cases, outcomes = Fuzz(folder), Counter()
    for seed in seeds:
        try:
            outcomes[cases.case(seed)] += 1
        except BaseException:
            print(f"seed {seed} of python -m tests.data.fuzz_damage", file=sys.stderr)
            raise
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow it")
    args = parser.parse_args()
    folder, start = Path(tempfile.mkdtemp()), time.monotonic()
    try:
        outcomes = fuzz(folder / "shards", range(args.seed, args.seed + args.cases))
    finally:
        shutil.rmtree(folder)
    told = ", ".join(f"{count} {what}" for what, count in outcomes.most_common())
    print(f"{args.cases} cases in {time.monotonic() - start:.0f} s: {told}")


if __name__ == "__main__":
    main()
