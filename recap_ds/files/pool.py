"""Worker processes for work on files, which never outlive the process that started them."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor


def process_pool(num_processes: int) -> ProcessPoolExecutor:
    """From a fork server: a fork of this process could catch one of its threads with a lock held."""
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(num_processes, mp_context=context, initializer=_begin)


def _begin() -> None:
    # Ctrl-C reaches the whole process group; what to do about it is decided where the work was ordered.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Else the workers of a killed parent wait for work for ever, or write on beside the next attempt."""
    multiprocessing.parent_process().join()
    os._exit(1)
