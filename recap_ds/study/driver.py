"""A study: what is missing of its units, run, and written down one by one.

Started again, it goes on: units in the results file are done, and a unit that was interrupted goes on with the job that
was (``unit.py``). Units run side by side; where one fails, the others save, and all end.
"""

import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from recap_ds.errors import RunStopped
from recap_ds.files.lock import hold_folder
from recap_ds.study.facts import arm_facts
from recap_ds.study.programs import Crew
from recap_ds.study.recipe import StudyRecipe, Unit
from recap_ds.study.results import StudyResults
from recap_ds.study.unit import UnitRunner

LOOK_SECONDS = 1.0


def run_study(recipe: StudyRecipe, out: Path, results: StudyResults, scripts: Path, num_jobs: int) -> None:
    """Every unit of the recipe that ``results`` lacks, ``num_jobs`` side by side."""
    waiting = [unit for unit in recipe.units() if not results.has(unit)]
    if not waiting:
        return
    crew = Crew(scripts, num_jobs)
    with hold_folder(out, f"--out {out}: another study runs there; wait for it"), _obeying_signals(crew):
        runner = UnitRunner(recipe, out, crew)
        runner.prepare(waiting)
        with ThreadPoolExecutor(num_jobs) as pool:
            _run_units(waiting, runner, recipe, results, pool, num_jobs, crew)


def _run_units(
    waiting: list[Unit],
    runner: UnitRunner,
    recipe: StudyRecipe,
    results: StudyResults,
    pool: ThreadPoolExecutor,
    num_jobs: int,
    crew: Crew,
) -> None:
    def run(unit: Unit) -> None:
        results.add(runner.run(unit), arm_facts(recipe, unit.arm))

    queue = list(waiting)
    running: dict[Future, Unit] = {}
    try:
        while queue or running:
            while len(running) < num_jobs and (unit := _next(queue, running.values(), recipe, results)) is not None:
                queue.remove(unit)
                running[pool.submit(run, unit)] = unit
            # Now and then this thread, which alone hears signals, must wake.
            for future in wait(running, LOOK_SECONDS, FIRST_COMPLETED).done:
                del running[future]
                future.result()
    except BaseException:
        crew.stop()
        raise


def _next(queue: Iterable[Unit], running: Iterable[Unit], recipe: StudyRecipe, results: StudyResults) -> Unit | None:
    """The first unit whose needed one is done, if possible one that waits for no critic of a unit that runs."""
    needed = {unit: recipe.needed(unit) for unit in queue}
    ready = [unit for unit, other in needed.items() if other is None or results.has(other)]
    busy = {recipe.critic_of(unit) for unit in running} - {None}
    return next((unit for unit in ready if recipe.critic_of(unit) not in busy), ready[0] if ready else None)


@contextmanager
def _obeying_signals(crew: Crew) -> Iterator[None]:
    """SIGTERM and Ctrl-C: jobs save and end, then so do we, by RunStopped."""
    assert threading.current_thread() is threading.main_thread()
    # Ctrl-C in a terminal reaches the whole process group.
    ways = {signal.SIGTERM: lambda *_: crew.stop_at_signal(), signal.SIGINT: lambda *_: crew.stop_at_signal(tell=False)}
    before = {number: signal.signal(number, way) for number, way in ways.items()}
    try:
        yield
    except RunStopped as stopped:
        print(f"{stopped}: was stopped; the same command goes on from there", flush=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
