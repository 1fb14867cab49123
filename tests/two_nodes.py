"""Two nodes for real, on one machine: ssh, pdsh, every launcher, and a cable that is pulled in the middle of a run.

    pytest tests/two_nodes.py        (as root; minutes, so it is not part of the suite: run it when launching changed)

The nodes are network namespaces (``tests/launch/nodes.py``) and share nothing but files: what README's "On a cluster"
says is done here word for word.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.harness import REPOSITORY
from tests.launch.nodes import ADDRESSES, TwoNodes, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

TRAIN = ("launch/train.py", "--deepspeed", "ds_configs/zero3.json")
# Long enough for a loaded machine to build the model in.
HANG_SECONDS, ALIVE_SECONDS = 60, 8
START_SECONDS = 240


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("nodes")
    # What every rank needs and no shell gives it: the nodes' only network is called "cable".
    lines = ("DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1", "GLOO_SOCKET_IFNAME=cable", "NOTE=a b;c*")
    (folder / "environment").write_text("\n".join(lines) + "\n")
    with TwoNodes(folder) as two:
        make = [sys.executable, "-m", "recap_ds.cli.main", "shards", "make", str(folder / "shards")]
        subprocess.run(make, cwd=REPOSITORY, check=True, capture_output=True)
        yield two


def start(nodes: TwoNodes, node: int, *words: str, log: Path | None = None, **settings: str) -> subprocess.Popen:
    environment = nodes.environment(
        HOSTFILE=str(nodes.hostfile),
        DS_ENV_FILE=str(nodes.folder / "environment"),
        SSH_ALIVE_SECONDS=str(ALIVE_SECONDS),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="cable",
        PYTHONPATH=str(REPOSITORY),
    )
    where = (log or nodes.folder / f"log_{node}").open("w")
    keywords = {"cwd": REPOSITORY, "stdout": where, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    return nodes.popen(node, list(words), environment | settings, **keywords)


def finish(process: subprocess.Popen, log: Path, seconds: float = START_SECONDS) -> str:
    process.wait(seconds)
    return log.read_text()


def training(nodes: TwoNodes, name: str, num_steps: int) -> list[str]:
    settings = (
        f"runs_dir={nodes.folder / 'runs'}",
        f"data.shards={nodes.folder / 'shards'}",
        f"name={name}",
        f"training.num_training_steps={num_steps}",
        "training.num_warmup_steps=1",
        "checkpoint.save_every_steps=10",
        "evaluation.max_samples=32",
        "logging.every_steps=1",
        "logging.wandb=disabled",
    )
    return [*TRAIN, *settings]


def summary(nodes: TwoNodes, name: str) -> dict:
    return json.loads((nodes.folder / "runs" / name / "summary.json").read_text())


def wait_until(what: str, condition: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended before {what}:\n{log.read_text()[-6000:]}"
        assert time.monotonic() < deadline, f"no {what} within {seconds} s:\n{log.read_text()[-6000:]}"
        time.sleep(0.2)


def test_words_variables_and_the_exit_code_survive_pdsh(nodes):
    program = nodes.folder / "say.py"
    program.write_text(
        "import json, os, sys\n"
        "print('SAID ' + json.dumps([os.environ['RANK'], os.environ['NOTE'], *sys.argv[2:]]))\n"
        "sys.exit(75)\n"
    )
    words = ["a b", "x={y: 1, z: 'q'}", "$HOME;`id`", "100%d %h", 'caf\u00e9"\\', "", "[*]", "lr=1e-4"]
    log = nodes.folder / "log_0"
    process = start(nodes, 0, "launch/multi_node.sh", str(program), *words)
    text = finish(process, log)
    said = sorted(json.loads(line.split("SAID ")[1]) for line in text.splitlines() if "SAID " in line)
    assert said == [["0", "a b;c*", *words], ["1", "a b;c*", *words]], text
    assert process.returncode == 75


def test_the_doctor_sees_both_nodes_and_measures_the_cable(nodes):
    words = ("--hostfile", str(nodes.hostfile), "--run-folder", str(nodes.folder / "runs" / "new"))
    command = [sys.executable, "-m", "recap_ds.cli.main", "doctor", *words, "--shards", str(nodes.folder / "shards")]
    process = start(nodes, 0, *command)
    text = finish(process, nodes.folder / "log_0")
    assert process.returncode == 0, text
    assert all(f"{address}: reached, CPU, same packages" in text for address in ADDRESSES), text
    assert "2 nodes" in text and "all-reduce" in text
    nodes.cut()
    try:
        process = start(nodes, 0, *command)
        text = finish(process, nodes.folder / "log_0")
    finally:
        nodes.mend()
    assert process.returncode == 1
    assert f"fail  hosts              {ADDRESSES[1]}: ssh failed: " in text and "bandwidth not measured" in text, text


def test_a_run_outlives_a_cable_that_is_pulled(nodes):
    """Ends non-zero within the timeout, starts again, goes on from its checkpoint."""
    log, run = nodes.folder / "log_0", nodes.folder / "runs" / "cut"
    words = ["launch/retry.sh", "launch/multi_node.sh", *training(nodes, "cut", 40)]
    words.append(f"training.hang_timeout_seconds={HANG_SECONDS}")
    process = start(nodes, 0, *words, RETRIES="1", PAUSE_SECONDS="5")
    wait_until("checkpoint", (run / "checkpoints" / "latest").exists, process, log, START_SECONDS)
    nodes.cut()
    cut_at = time.monotonic()
    try:
        # The watchdog of each rank, then ssh's; a loaded machine may be late.
        seconds = HANG_SECONDS + 2 * ALIVE_SECONDS + 60
        wait_until("failure", lambda: "retry.sh: exit code" in log.read_text(), process, log, seconds)
    finally:
        nodes.mend()
    print(f"the job had ended {time.monotonic() - cut_at:.0f} s after the cable was pulled")
    text = finish(process, log, START_SECONDS)
    assert process.returncode == 0, text[-6000:]
    assert summary(nodes, "cut")["step"] == 40
    first, second = text.split("retry.sh: exit code")
    assert f"starting {run} at step 0" in first and re.search(
        rf"continuing {re.escape(str(run))} at step [123]0", second
    )
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 41)), "no step is missing"
    assert nodes.processes() == []


@pytest.mark.parametrize("launcher", ["no_ssh", "torchrun"])
def test_launchers_that_need_no_ssh(nodes, launcher):
    """The same command on each node, which differs in its own number alone."""
    words = training(nodes, launcher, 2)
    processes, logs = [], []
    for node in range(2):
        log = nodes.folder / f"log_{launcher}_{node}"
        if launcher == "no_ssh":
            process = start(nodes, node, "launch/multi_node.sh", *words, log=log, NODE_RANK=str(node))
        else:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
            torchrun += ["--node_rank", str(node), "--master_addr", ADDRESSES[0], "--master_port", "29555"]
            process = start(nodes, node, *torchrun, *words, log=log)
        processes.append(process)
        logs.append(log)
    texts = [finish(process, log) for process, log in zip(processes, logs, strict=True)]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-3000:] for text in texts)
    assert summary(nodes, launcher)["step"] == 2
