"""RECAP's iterations (arXiv 2511.14759, Algorithm 1): critic, labels, policy, each a program of its own; in a
simulator also what comes before and after them, the collection by the policy so far and the policy's evaluation.

A driver and nothing more: what a job does, how it resumes and what it refuses is the job's. It runs one job at a time
in the foreground and stops at the first that fails; started again, it goes on with the first that is not done.
"""

import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from recap_ds.data.merge import merge_shards
from recap_ds.errors import EXIT_STOPPED, RunFailed, RunStopped, UsageError
from recap_ds.iterate.folder import IterationFolder, check_settings
from recap_ds.iterate.program import Program
from recap_ds.iterate.recipe import IterationRecipe, TrainingJob

TRAIN, LABEL, EVALUATE = "train.py", "label.py", "evaluate.py"


def iterate(
    recipe: IterationRecipe, out: Path, launcher: str, programs: Path, num_iterations: int | None = None
) -> list[Path]:
    """Run iterations 1..``num_iterations`` (all shards named) to the end; returns the policies' run folders.

    ``programs`` is the folder of the launch scripts, ``launcher`` what starts them, with its own arguments.
    """
    start = _launcher(launcher, programs)
    num_iterations = len(recipe.shards) if num_iterations is None else num_iterations
    if num_iterations > len(recipe.shards) and recipe.collect is None:
        raise UsageError(
            f"--iterations {num_iterations}: the recipe names {len(recipe.shards)} folder(s) of shards, one for each "
            "iteration; over the same shards the next would only repeat the last. Add a folder, or collect:"
        )
    for number in range(1, num_iterations + 1):
        folder = IterationFolder(out, number)
        folder.check_tag(recipe, number)
        folder.check_data(folder.shards_of(recipe, number))
    check_settings(out, recipe)
    return [_run_iteration(recipe, out, number, start, programs) for number in range(1, num_iterations + 1)]


def _run_iteration(recipe: IterationRecipe, out: Path, number: int, start: list[str], programs: Path) -> Path:
    folder, tag = IterationFolder(out, number), recipe.tag(number)
    where = f"iteration {number}"
    if number > len(recipe.shards) and not folder.data_are_whole():
        _collect(recipe, IterationFolder(out, number - 1), folder, where)
    folder.start(recipe, number)
    first = IterationFolder(out, 1)

    def train(name: str, job: TrainingJob, *own: str) -> dict:
        if folder.summary(name) is None:
            command = [*start, str(programs / TRAIN), "--deepspeed", recipe.deepspeed, "--config", job.recipe]
            words = training_overrides(folder, name, job)
            if number > 1 and (batch := first.global_batch(name)) is not None:
                # On however many ranks: the training program divides it, or says why it cannot.
                words.append(f"training.global_batch_size={batch}")
            _run(f"{where}: {name}", [*command, *words, *own])
        else:
            print(f"{where}: {name} is done", flush=True)
        summary = folder.summary(name)
        if summary is None:
            raise RunFailed(f"{where}: {name} ended well but left no summary in {folder.path / name}")
        return summary

    critic = train("critic", recipe.critic)
    if folder.labels_are_done():
        print(f"{where}: labels are done", flush=True)
    else:
        command = [*start, str(programs / LABEL), "--checkpoint", str(folder.critic_checkpoint())]
        _run(f"{where}: labels", [*command, "--shards", str(folder.shards), "--tag", tag, *recipe.label.settings])
        folder.adopt_labels(tag)
    policy = train("policy", recipe.policy, "recap.sft=false", f"data.labels={tag}")
    if recipe.evaluate is not None and folder.is_evaluated(recipe):
        print(f"{where}: evaluation is done", flush=True)
    elif recipe.evaluate is not None:
        if folder.results.is_file():
            print(f"{where}: the evaluation there is of another policy or other settings; it is made again", flush=True)
        _run(f"{where}: evaluation", [*start, str(programs / EVALUATE), *evaluation_words(recipe, folder)])
    folder.finish({"recipe": recipe.model_dump(mode="json"), "tag": tag, "critic": critic, "policy": policy})
    return folder.policy


def _collect(recipe: IterationRecipe, before: IterationFolder, folder: IterationFolder, where: str) -> None:
    """The policy of the iteration before plays; what it did joins the data of that iteration."""
    assert recipe.env is not None and recipe.collect is not None, "checked when the recipe was read"
    wanted = recipe.collect
    numbers = ["--episodes", str(wanted.episodes)]
    if wanted.corrections is not None:
        numbers += ["--corrections", str(wanted.corrections)]
    words = ["--env", recipe.env.name, "--checkpoint", str(before.policy), "--out", str(folder.collected), *numbers]
    words += ["--name", f"{recipe.name}_{folder.path.name}", *recipe.env.settings, *wanted.settings]
    # One process: episodes are few, and its environments are processes of their own.
    _run(f"{where}: collection", [sys.executable, "-m", "recap_ds.cli.main", "collect", *words])
    merge_shards([before.shards.resolve(), folder.collected], folder.data)


def evaluation_words(recipe: IterationRecipe, folder: IterationFolder) -> list[str]:
    assert recipe.env is not None and recipe.evaluate is not None, "checked when the recipe was read"
    words = ["--checkpoint", str(folder.policy), "--env", recipe.env.name, "--out", str(folder.results)]
    return [*words, "--episodes", str(recipe.evaluate.episodes), *recipe.env.settings, *recipe.evaluate.settings]


def training_overrides(folder: IterationFolder, name: str, job: TrainingJob) -> list[str]:
    """What the iteration says of a training job, over its recipe and settings."""
    start_from = folder.start_of(name, job)
    return [
        *job.settings,
        f"name={name}",
        f"runs_dir={folder.path}",
        f"data.shards={folder.shards}",
        f"training.stage={name}",
        f"training.start_from={start_from or 'null'}",
        "training.resume=auto",
    ]


def _launcher(launcher: str, programs: Path) -> list[str]:
    words = shlex.split(launcher)
    if not words or shutil.which(words[0]) is None:
        raise UsageError(f"--launcher '{launcher}': there is no program '{words[0] if words else ''}' on the PATH")
    for name in (TRAIN, LABEL, EVALUATE):
        if not (programs / name).is_file():
            raise UsageError(f"--programs {programs}: has no {name}; name the launch/ folder of the repository")
    return words


def _run(what: str, command: Sequence[str]) -> None:
    """One job to its end. RunFailed where it fails, RunStopped where it or we were told to stop."""
    print(f"{what}: {shlex.join(command)}", flush=True)
    program = Program()
    code = program.run(command)
    if code == EXIT_STOPPED or program.is_stopping:
        print(f"{what} was stopped; the same command goes on from there", file=sys.stderr)
        raise RunStopped(what)
    if code != 0:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise RunFailed(f"{what} {how}; what is done stays done, the same command goes on from there")
