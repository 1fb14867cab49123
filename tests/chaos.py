"""A run that is killed, starved and damaged again and again, and must end with the weights of one that was left alone.

    python -m tests.chaos --rounds 25 [--seed 0] [--folder FOLDER]

Two ranks train a tiny policy through the ``deepspeed`` launcher. In every round something happens at a random step: one
or both ranks get SIGKILL, also in the middle of a save; the disk fills, for a while or until the run ends; and before
the next start a file of the newest checkpoint may be cut or have a bit flipped. Checkpoints are written in the
foreground and in the background by turns. Prints a line per round and one line of JSON at the end; exit code 1 where
anything differs. The disk is a small tmpfs where this user may mount one, else a limit on the size of files.

Signals only processes that it started itself.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from recap_ds.checkpoint import layout
from recap_ds.checkpoint.record import CheckpointRecord, verify_checkpoint
from recap_ds.config import PiStarRECAPConfig
from recap_ds.envs.scripted import write_reach_shards
from recap_ds.recipe import dump_config
from tests.distributed.harness import LAUNCHER_VARIABLES, REPOSITORY, free_port
from tests.tiny import tiny_config

STEPS_PER_ROUND = 4
SAVE_EVERY = 3
PATIENCE_SECONDS = 300.0
TMPFS_BYTES = 64 * 2**20
# More than a log or metrics need, less than a rank's tiles.
FILE_LIMIT_BYTES = 2**18
KINDS = (
    "kill at the start",
    "kill one",
    "kill both",
    "kill in a save",
    "kill in a save",
    "disk full for a while",
    "disk full to the end",
)
DAMAGES = (None, None, "cut", "bit")


class ChaosFailed(AssertionError):
    """What should have survived did not."""


def config_of(folder: Path, name: str, num_steps: int) -> PiStarRECAPConfig:
    return tiny_config(
        name=name,
        runs_dir=str(folder),
        chunk_size=10,
        model={"conv_stem": True, "max_prompt_tokens": 40, "image_size": 32},
        training={"batch_size": 2, "num_training_steps": num_steps, "learning_rate": 1e-3, "use_amp": False},
        recap={"advantage_window": 64, "advantage_window_min": 4, "indicator_warmup_steps": 1},
        data={"shards": str(folder.parent / "shards"), "num_workers": 0},
        checkpoint={"save_every_steps": SAVE_EVERY, "keep_last": 3},
        logging={"every_steps": 1, "wandb": "disabled"},
    )


class Job:
    """One start of the run, by the launcher; its ranks are found as the launcher's descendants."""

    def __init__(self, recipe: Path, run: Path, log: Path, *overrides: str) -> None:
        self.run, self.log = run, log
        self._metrics_before = self._metrics_file()
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
        train = ["launch/train.py", "--deepspeed", "ds_configs/zero3.json", "--config", str(recipe), *overrides]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*launcher, "--master_port", str(free_port()), *train],
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ranks(self) -> dict[int, int]:
        """Local rank -> process id."""
        found = {}
        for process in _descendants(self.process.pid):
            words = _command_line(process)
            ranks = [word for word in words if word.startswith("--local_rank=")]
            # The launcher itself has no such flag, and data workers have none of ours.
            if ranks and "launch/train.py" in words:
                found[int(ranks[0].split("=")[1])] = process
        return found

    def _metrics_file(self) -> int | None:
        """A start that goes on writes the file anew."""
        path = self.run / "metrics.jsonl"
        return path.stat().st_ino if path.is_file() else None

    def step(self) -> int:
        """The last step in this start's metrics; 0 before the first."""
        if self._metrics_file() in (None, self._metrics_before):
            return 0
        lines = (self.run / "metrics.jsonl").read_text(errors="replace").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # on a full disk half a line may stand there
        return json.loads(whole[-1])["step"] if whole else 0

    def wait_until(self, reached: Callable[[], bool]) -> bool:
        """False where the job ended first."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not reached():
            if self.process.poll() is not None:
                return reached()
            if time.monotonic() > deadline:
                raise ChaosFailed(f"nothing happened for {PATIENCE_SECONDS:.0f} s\n{self.output()}")
            time.sleep(0.002)
        return True

    def kill(self, *ranks: int) -> None:
        """SIGKILL to these ranks at once."""
        processes = self.ranks()
        for rank in ranks:
            if rank in processes:
                os.kill(processes[rank], signal.SIGKILL)

    def end(self) -> int:
        """Exit code; the launcher brings down what is left of its ranks."""
        try:
            return self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise ChaosFailed(f"did not come down after a rank died\n{self.output()}") from None
        finally:
            self.destroy()

    def destroy(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # a session of its own: nobody else's processes
        self.process.wait()

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


def _descendants(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(OSError):  # it may end while we look
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return children + [process for child in children for process in _descendants(child)]


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


class Disk:
    """Where the run lives; can be made full."""

    def __init__(self, folder: Path, may_mount: bool) -> None:
        self.folder = folder
        folder.mkdir()
        self.mounted = may_mount and _mount(folder)
        self._filler = folder / "filler"

    def fill(self, job: Job) -> None:
        if self.mounted:
            with self._filler.open("wb") as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(2**16))
        for process in () if self.mounted else job.ranks().values():
            resource.prlimit(process, resource.RLIMIT_FSIZE, (FILE_LIMIT_BYTES, resource.RLIM_INFINITY))

    def free(self, job: Job) -> None:
        self._filler.unlink(missing_ok=True)
        for process in () if self.mounted else job.ranks().values():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def leave(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


def _mount(folder: Path) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Chaos:
    """A run in ``folder/disk`` and, for comparison, one that is left alone in ``folder/calm``."""

    def __init__(self, folder: Path, num_steps: int, may_mount: bool) -> None:
        self.folder, self.num_steps, self.num_starts = folder, num_steps, 0
        self.disk = Disk(folder / "disk", may_mount)
        (folder / "calm").mkdir()
        write_reach_shards(folder / "shards", num_demo=3, num_auto=3, num_intervention=2, size=32)
        for place in ("disk", "calm"):
            config = config_of(folder / place, "run", num_steps)
            (folder / f"{place}.yaml").write_text(dump_config(config))

    @property
    def checkpoints(self) -> Path:
        return self.folder / "disk" / "run" / layout.CHECKPOINTS_NAME

    def start(self, *overrides: str, place: str = "disk") -> Job:
        self.num_starts += 1
        log = self.folder / f"{place}_{self.num_starts}.log"
        return Job(self.folder / f"{place}.yaml", self.folder / place / "run", log, *overrides)

    def finish(self, *overrides: str, place: str = "disk") -> dict[str, str]:
        """Let the run go on to its end; checksums of what it ends with."""
        job = self.start(*overrides, place=place)
        if job.end() != 0:
            raise ChaosFailed(f"could not be finished\n{job.output()}")
        final = job.run / layout.CHECKPOINTS_NAME / layout.step_name(self.num_steps)
        if problems := verify_checkpoint(final):
            raise ChaosFailed(f"{final}: {problems}")
        return {name: record.sha256 for name, record in CheckpointRecord.load(final).files.items()}

    def happen(self, kind: str, job: Job, at_step: int, draw: random.Random) -> str:
        """Do it to a live job and wait until the job is down; what became of it."""
        if kind == "kill at the start":
            job.wait_until(lambda: len(job.ranks()) == 2)
            time.sleep(draw.uniform(0.0, 15.0))
            job.kill(0, 1)
            return self._down(job, f"at step {job.step()}")
        if not job.wait_until(lambda: job.step() >= at_step):
            return self._down(job, "ended before")
        if kind == "kill in a save":
            job.wait_until(lambda: any(self.checkpoints.glob(".step_*.unfinished")))
            time.sleep(draw.uniform(0.0, 0.02))
            job.kill(0, 1)
            was_in_save = any(self.checkpoints.glob(".step_*.unfinished"))
            return self._down(job, "in the save" if was_in_save else "just after the save")
        if kind.startswith("kill"):
            time.sleep(draw.uniform(0.0, 0.3))
            job.kill(*((0, 1) if kind == "kill both" else (draw.randrange(2),)))
            return self._down(job, f"at step {job.step()}")
        self.disk.fill(job)
        job.wait_until(lambda: " failed (" in job.output())
        if kind == "disk full to the end":
            became = self._down(job, "ended by itself")
            self.disk.free(job)
            return became
        self.disk.free(job)
        warned = job.step()
        job.wait_until(lambda: job.step() >= min(warned + SAVE_EVERY + 1, self.num_steps))
        reached = job.step()
        job.kill(0, 1)
        return self._down(job, f"went on from step {warned} to {reached}")

    def _down(self, job: Job, became: str) -> str:
        code = job.end()
        if code == 2 or (code == 0 and not (job.run / "summary.json").is_file()):
            raise ChaosFailed(f"exit code {code} of a run that was not finished\n{job.output()}")
        return became

    def damage(self, how: str, draw: random.Random) -> str | None:
        """Of the newest checkpoint, if there is an older one that is whole."""
        folders = list(layout.step_folders(self.checkpoints).values())
        if len(folders) < 2 or verify_checkpoint(folders[-2]):
            return None
        path = draw.choice(sorted(path for path in folders[-1].iterdir() if path.stat().st_size))
        data = bytearray(path.read_bytes())
        place = draw.randrange(len(data))
        if how == "cut":
            del data[place:]
        else:
            data[place] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        return f"{how}: {folders[-1].name}/{path.name} at byte {place}"


@contextlib.contextmanager
def chaos_in(folder: Path, num_steps: int, may_mount: bool) -> Iterator[Chaos]:
    chaos = Chaos(folder, num_steps, may_mount)
    try:
        yield chaos
    finally:
        chaos.disk.leave()


def run_rounds(chaos: Chaos, num_rounds: int, seed: int) -> Counter:
    """``num_rounds`` of what may happen, at random but by ``seed``; how often each did."""
    draw, happened = random.Random(seed), Counter()
    for number in range(num_rounds):
        kind = draw.choice(KINDS)
        job = chaos.start(f"checkpoint.background={'true' if number % 2 else 'false'}")
        try:
            before = max(layout.step_folders(chaos.checkpoints), default=0)
            # No sooner than a first checkpoint: before that a full disk ends the run, as it should.
            at_step = max(SAVE_EVERY + 1, before + draw.randrange(1, 2 * SAVE_EVERY + 1))
            became = chaos.happen(kind, job, at_step, draw)
        finally:
            job.destroy()
            chaos.disk.free(job)
        how = draw.choice(DAMAGES)
        damage = how and chaos.damage(how, draw)
        happened.update([f"{kind} ({became})" if kind == "kill in a save" else kind, *([how] if damage else [])])
        print(f"round {number + 1:>2}/{num_rounds}: {kind}: {became}{f'; {damage}' if damage else ''}", flush=True)
    return happened


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; by default a temporary one that is removed")
    given = parser.parse_args()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="recap_ds_chaos_")))
        folder.mkdir(parents=True, exist_ok=True)
        num_steps = STEPS_PER_ROUND * (given.rounds + 1)
        chaos = stack.enter_context(chaos_in(folder, num_steps, may_mount=True))
        expected = chaos.finish(place="calm")
        print(f"left alone: {num_steps} steps in {time.monotonic() - began:.0f} s", flush=True)
        happened = run_rounds(chaos, given.rounds, given.seed)
        found = chaos.finish()
        report = {
            "rounds": given.rounds,
            "seed": given.seed,
            "steps": num_steps,
            "disk": "tmpfs" if chaos.disk.mounted else "file size limit",
            "happened": dict(sorted(happened.items())),
            "equal": found == expected,
            "seconds": round(time.monotonic() - began),
        }
    print(json.dumps(report))
    return 0 if report["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
