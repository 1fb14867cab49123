"""Loader worker processes: how they start, and which signals reach them.

Preemption (SIGTERM, SIGUSR1), Ctrl-C and a closed terminal (SIGHUP) are sent to whole process groups. What to do about
them is the training process's decision, and it may need its workers until it has done it: they ignore these signals,
and die when it exits.
"""

import atexit
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver, resource_tracker

import torch

from recap_ds.config import DataConfig

SHIELDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def worker_options(data: DataConfig) -> dict:
    """Arguments of a DataLoader that has workers.

    Workers come from a fork server, not from a fork of the training process: that has threads (communication, progress,
    autograd), and a fork can catch one of them with a lock held. The server imports the loader once for all workers.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recap_ds.data.loader"])
    _start_server()
    # Plain shared memory without a lock: it is read in a signal handler.
    is_exiting = context.RawValue(ctypes.c_bool, False)
    # Before multiprocessing's own exit handler, which sends SIGTERM to the workers and waits for them.
    atexit.register(_set, is_exiting)
    return {
        "num_workers": data.num_workers,
        "multiprocessing_context": context,
        "prefetch_factor": -(-data.prefetch_batches // data.num_workers),  # per worker, rounded up
        "worker_init_fn": partial(_init_worker, is_exiting),
    }


def _start_server() -> None:
    """Start the fork server with our signals blocked: it, and the workers forked from it, inherit the mask."""
    # Separately, because the resource tracker unblocks some signals in this process once it has started.
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):
        with _blocked_signals():
            start()


@contextmanager
def _blocked_signals() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(is_exiting: ctypes.c_bool, worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if is_exiting.value else None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """torch watches the fork server only, which lives as long as its workers: a killed run would leave them all."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _set(flag: ctypes.c_bool) -> None:
    flag.value = True
