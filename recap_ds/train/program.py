"""A training run as a program: joined ranks, somebody who watches, and every way it can end.

Done: the summary. Asked to stop: ``RunStopped``, on all ranks together. Failed: the rank that failed first says so in
one line, followed by its traceback where it is our bug; every other rank says whom it lost. All tracebacks are in
runs/<name>/failures/. Then nobody waits for anybody: a process group that lost a rank cannot be left in order.
"""

import re
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import torch
import torch.distributed

from recap_ds.distributed.lifeline import Lifeline, Lost
from recap_ds.distributed.runtime import RankInfo, memory_report, start_runtime, stop_runtime
from recap_ds.errors import RunFailed, RunStopped, UsageError, leave
from recap_ds.train.failures import FailureLog
from recap_ds.train.loop import train
from recap_ds.train.session import Plan, RunWatch, start_session
from recap_ds.train.stopping import StopRequests, StopSignals, find_launchers
from recap_ds.train.watchdog import Watchdog

# A rank that lost another waits so long for word of who that was, and lets it speak first.
PATIENCE_SECONDS = 3.0
# Collectives give up after the watchdog, which knows more; without one, after half an hour.
COLLECTIVE_SECONDS, COLLECTIVE_MARGIN_SECONDS = 1800.0, 300.0
_LOST_PEER = re.compile(r"connection (closed|reset|refused)|broken pipe|gloo|nccl|timed out", re.IGNORECASE)
_speaking = threading.Lock()  # taken once, by whoever ends this process


def run_training(plan: Plan, signals: StopSignals, began: float) -> dict[str, Any]:
    """Train to the end and return the summary; RunStopped where it was asked to stop before.

    ``began`` is when this process did, by ``time.monotonic``. Collective: every rank must call.
    """
    hang = plan.config.training.hang_timeout_seconds
    log = FailureLog(plan.run.failures, plan.info.rank)
    signals.defer()
    runtime = start_runtime(plan.info, COLLECTIVE_SECONDS if hang is None else hang + COLLECTIVE_MARGIN_SECONDS)
    lifeline = Lifeline(runtime, lambda lost: _follow(lost, plan.info, log))
    with Watchdog(log, plan.info, hang) as watchdog:
        teller = FailureTeller(plan, lifeline, log, watchdog)
        watch = RunWatch(stop_requests(plan, signals, began), watchdog.mark, teller.tell)
        try:
            summary = train(start_session(plan, runtime, watch))
        except RunStopped:
            signals.leave()
            lifeline.leave()
            stop_runtime()
            raise
        except Exception as error:
            teller.end(error)
        lifeline.leave()
    stop_runtime()
    return summary


def stop_requests(plan: Plan, signals: StopSignals, began: float) -> StopRequests:
    """What this rank looks out for: signals come to any, files and clocks are rank 0's, launchers their node's."""
    info = plan.info
    return StopRequests(
        signals,
        plan.run.stop_file if info.is_main else None,
        plan.config.training.max_wall_minutes if info.is_main else None,
        find_launchers() if info.local_rank == 0 else [],
        began,
    )


class FailureTeller:
    """Says once why this rank fails, and ends it."""

    def __init__(self, plan: Plan, lifeline: Lifeline, log: FailureLog, watchdog: Watchdog) -> None:
        self._plan, self._lifeline, self._log, self._watchdog = plan, lifeline, log, watchdog
        self._told: Exception | None = None
        self._code = 1

    def tell(self, error: Exception) -> None:
        """At once, to people and to the other ranks: what is closed and uploaded afterwards may take long."""
        if self._told is not None:
            return
        self._told = error
        why = self._write_down(error)
        if self._plan.info.world > 1:
            self._code = self._speak(error, why)

    def end(self, error: Exception) -> NoReturn:
        """Of several ranks, this one exits. A single one raises what its program prints."""
        self.tell(error)
        if self._plan.info.world > 1:
            leave(self._code)
        if is_out_of_memory(error):
            raise RunFailed(f"{self._explain(error)}; see {self._log.path}") from error
        raise error

    def _explain(self, error: Exception) -> str:
        place = self._watchdog.place
        return f"{out_of_memory_advice(self._plan)} ({place})" if is_out_of_memory(error) else explain(error, place)

    def _write_down(self, error: Exception) -> str:
        why = self._explain(error)
        if not _is_meant_for_users(error):
            self._log.exception(why, error, memory_report() if is_out_of_memory(error) else "")
        return why

    def _speak(self, error: Exception, why: str) -> int:
        """The first rank to fail explains, others say whom they lost; all exit with the first one's code."""
        code = 2 if isinstance(error, UsageError) else 1
        lost = self._lifeline.await_lost(PATIENCE_SECONDS) if _is_lost_peer(error) else None
        lost = lost or self._lifeline.fail(why, code, PATIENCE_SECONDS)
        _speaking.acquire()
        info = self._plan.info
        if lost.rank == info.rank:
            see = "" if _is_meant_for_users(error) else f"; see {self._log.path}"
            print(f"error: rank {info.rank}: {why}{see}", file=sys.stderr, flush=True)
            if not _is_meant_for_users(error) and not is_out_of_memory(error):
                traceback.print_exception(error)
        elif lost.why != why:  # what all ranks found together is said once
            _say_lost(lost, info, self._log)
        return lost.code


def _follow(lost: Lost, info: RankInfo, log: FailureLog) -> None:
    """In the lifeline's thread: give this rank's main thread time to end by itself, then end it."""
    time.sleep(PATIENCE_SECONDS)
    if _speaking.acquire(blocking=False):
        log.stacks(f"lost rank {lost.rank}: {lost.why}")
        _say_lost(lost, info, log)
    leave(lost.code)


def _say_lost(lost: Lost, info: RankInfo, log: FailureLog) -> None:
    print(f"error: rank {info.rank}: lost rank {lost.rank}: {lost.why}; more in {log.folder}", file=sys.stderr)


def explain(error: Exception, place: str) -> str:
    """One line about any error."""
    if _is_meant_for_users(error):
        return " ".join(str(error).split())
    first = str(error).strip().split("\n")[0][:300]
    return f"{type(error).__name__}: {first} ({place})"


def _is_meant_for_users(error: Exception) -> bool:
    return isinstance(error, UsageError | RunFailed)


def _is_lost_peer(error: Exception) -> bool:
    """True = a collective broke: the cause is another rank's, as a rule."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and not _is_meant_for_users(error) and bool(_LOST_PEER.search(str(error)))


def is_out_of_memory(error: Exception) -> bool:
    # The host's allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def out_of_memory_advice(plan: Plan) -> str:
    """What can be changed, from the cheapest on, with what it is now."""
    training, zero = plan.config.training, plan.ds_config["zero_optimization"]
    advice = []
    if training.batch_size > 1:
        same = "" if training.global_batch_size else f" and set training.global_batch_size={plan.sizes.total}"
        advice.append(f"lower training.batch_size (now {training.batch_size}){same}: the result stays the same")
    if not training.activation_checkpointing:
        advice.append("set training.activation_checkpointing=true (now false)")
    if zero["stage"] != 3:
        advice.append(f"use ds_configs/zero3.json (now stage {zero['stage']})")
    elif (zero.get("offload_optimizer") or {}).get("device", "none") == "none":
        advice.append("use ds_configs/zero3_offload.json (the optimizer is not offloaded now)")
    return f"out of memory: {', or '.join(advice or ['use more ranks, or a smaller model'])}"
