"""A study: what is missing of its units, run, and written down one by one.

Started again, it goes on: units in the results file are done, and a unit that was interrupted goes on with the job that
was (``unit.py``). Units run side by side; where one fails, the others save, and all end.
"""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from recap_ds.errors import RunStopped
from recap_ds.files.lock import hold_folder
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
        runner.prepare()
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
        results.add(runner.run(unit), recipe.arm_facts(unit.arm))

    queue, running = list(waiting), set()
    try:
        while queue or running:
            while queue and len(running) < num_jobs:
                running.add(pool.submit(run, queue.pop(0)))
            # Now and then this thread, which alone hears signals, must wake.
            done, running = wait(running, LOOK_SECONDS, FIRST_COMPLETED)
            for future in done:
                future.result()
    except BaseException:
        crew.stop()
        raise


@contextmanager
def _obeying_signals(crew: Crew) -> Iterator[None]:
    """SIGTERM and Ctrl-C: jobs save and end, then so do we, by RunStopped."""
    assert threading.current_thread() is threading.main_thread()
    # Ctrl-C reaches the whole process group.
    ways = {signal.SIGTERM: lambda *_: crew.stop(), signal.SIGINT: lambda *_: crew.stop(tell=False)}
    before = {number: signal.signal(number, way) for number, way in ways.items()}
    try:
        yield
    except RunStopped as stopped:
        print(f"{stopped}: was stopped; the same command goes on from there", flush=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
