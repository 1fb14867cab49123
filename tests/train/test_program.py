"""What is said of a failure. Launched ranks that fail: test_endings.py."""

from types import SimpleNamespace

import pytest
import torch

from recap_ds.distributed.lifeline import Lifeline
from recap_ds.distributed.runtime import RankInfo, Runtime
from recap_ds.errors import RunFailed, UsageError
from recap_ds.train import program
from recap_ds.train.failures import FailureLog
from tests.tiny import tiny_config


def plan_of(zero: dict | None = None, **training) -> SimpleNamespace:
    config = tiny_config(training=training)
    zero = {"stage": 3} if zero is None else zero
    return SimpleNamespace(
        config=config, ds_config={"zero_optimization": zero}, sizes=SimpleNamespace(total=64), info=RankInfo()
    )


ACTIVATIONS = "set training.activation_checkpointing=true (now false)"
OFFLOAD = "use ds_configs/zero3_offload.json (the optimizer is not offloaded now)"


@pytest.mark.parametrize(
    ("zero", "training", "said"),
    [
        (
            None,
            {"batch_size": 8},
            "lower training.batch_size (now 8) and set training.global_batch_size=64: the result stays the same, or "
            f"{ACTIVATIONS}, or {OFFLOAD}",
        ),
        (None, {"batch_size": 1}, f"{ACTIVATIONS}, or {OFFLOAD}"),
        (
            {"stage": 2},
            {"batch_size": 1, "activation_checkpointing": True},
            "use ds_configs/zero3.json (now stage 2)",
        ),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu"}},
            {"batch_size": 1, "activation_checkpointing": True},
            "use more ranks, or a smaller model",
        ),
    ],
)
def test_memory_advice_names_what_is_left_to_change(zero, training, said):
    assert program.out_of_memory_advice(plan_of(zero, **training)) == f"out of memory: {said}"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_can_end_in_several_ways(error):
    assert program.is_out_of_memory(error)
    assert not program.is_out_of_memory(RuntimeError("shape mismatch"))


def test_the_hosts_own_allocator_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert program.is_out_of_memory(caught.value)


def test_errors_are_explained_in_one_line():
    assert program.explain(UsageError("data.shards: two\nlines"), "step 3") == "data.shards: two lines"
    assert program.explain(KeyError("elbow"), "step 3") == "KeyError: 'elbow' (step 3)"
    assert program.explain(RuntimeError("first\nC++ frames\n"), "step 3") == "RuntimeError: first (step 3)"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:30481"), True),
        (torch.distributed.DistBackendError("anything"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RunFailed("runs/x: saving failed (Broken pipe)"), False),
        (OSError("Connection reset by peer"), False),
    ],
)
def test_a_broken_collective_is_anothers_fault(error, lost):
    assert program._is_lost_peer(error) is lost


@pytest.fixture
def fail(tmp_path):
    """``fail(error)``: what a run of one rank raises for it, and its failures file."""
    runtime = Runtime(RankInfo(), torch.device("cpu"), "gloo")
    log = FailureLog(tmp_path / "failures", 0)

    def run(error: Exception):
        lifeline = Lifeline(runtime, lambda lost: None)
        teller = program.FailureTeller(plan_of(batch_size=1), lifeline, log, SimpleNamespace(place="step 3"))
        teller.tell(error)
        with pytest.raises(type(error) if not program.is_out_of_memory(error) else RunFailed) as caught:
            teller.end(error)
        return caught.value, log.path.read_text() if log.path.is_file() else ""

    return run


def test_one_rank_raises_what_the_program_prints(fail):
    for error in (UsageError("data.shards: gone"), RunFailed("diverged")):
        assert fail(error) == (error, ""), "meant for people: no traceback"
    bug, written = fail(KeyError("elbow"))
    assert isinstance(bug, KeyError) and "KeyError: 'elbow' (step 3)" in written
    assert written.count("=== ") == 1, "told once"


def test_one_rank_out_of_memory_fails_in_one_line(fail):
    error, written = fail(torch.OutOfMemoryError("tried to allocate 2.00 GiB"))
    assert isinstance(error, RunFailed) and str(error).startswith("out of memory: set training.activation_check")
    assert "(step 3); see " in str(error)
    assert "tried to allocate 2.00 GiB" in written and "peak resident set: " in written
