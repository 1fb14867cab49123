"""Who may ask a run to stop. Processes of their own where a signal ends one."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from recap_ds.train import stopping
from recap_ds.train.stopping import Process, StopRequests, StopSignals, describe, find_launchers

REPOSITORY = Path(__file__).parents[2]


def run_python(source: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


@pytest.fixture
def signals():
    # Nothing is ignored, also where the tests themselves were started by nohup or in a script's background.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in stopping.STOP_SIGNALS}
    try:
        with StopSignals() as listening:
            listening.defer()
            yield listening
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def send(signals: StopSignals, number: int) -> None:
    """Sent and heard: a thread hears it."""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 30
    while not signals.code and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_becomes_a_request_that_is_named(signals, number):
    requests = StopRequests(signals)
    assert requests.poll() == 0
    send(signals, number)
    assert describe(requests.poll()) == number.name


def test_the_first_signal_is_the_reason_and_is_answered_once(signals, capsys):
    send(signals, signal.SIGINT)
    signals._note(signal.SIGTERM)  # as deepspeed does on Ctrl-C
    assert describe(signals.code) == "SIGINT"
    assert capsys.readouterr().err == "SIGINT: saving after this step, then leaving; once more leaves at once\n"


def test_handlers_come_back_afterwards():
    before = {number: signal.getsignal(number) for number in stopping.STOP_SIGNALS}
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in stopping.STOP_SIGNALS} == before


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with StopSignals() as signals:
            signals.defer()
            os.kill(os.getpid(), signal.SIGHUP)
            send(signals, signal.SIGTERM)
            assert describe(signals.code) == "SIGTERM"
    finally:
        signal.signal(signal.SIGHUP, before)


BLOCKED = """
    import os, signal, sys, threading, time
    from recap_ds.train.stopping import StopSignals

    with StopSignals(echo_seconds=float(sys.argv[1])) as signals:
        if sys.argv[2] == "running":
            signals.defer()
        times = int(sys.argv[3])
        def send():
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3)
            os._exit(0)
        threading.Thread(target=send, daemon=True).start()
        lock = threading.Lock()
        lock.acquire()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # the main thread takes no notice of anything
        lock.acquire()
"""


def test_before_the_run_begins_a_signal_ends_the_process_as_stopped():
    done = run_python(BLOCKED, "0.1", "planning", "1")
    assert done.returncode == 75
    assert done.stderr == "SIGTERM: stopped before the run began\n"


def test_a_second_signal_ends_even_a_process_that_is_stuck():
    done = run_python(BLOCKED, "0.1", "running", "2")
    assert done.returncode == 128 + signal.SIGTERM
    first, second = done.stderr.splitlines()
    assert first == "SIGTERM: saving after this step, then leaving; once more leaves at once"
    assert second == "SIGTERM again: left at once; what was saved before is safe"


def test_what_a_launcher_passes_on_is_no_second_signal():
    done = run_python(BLOCKED, "30", "running", "2")
    assert done.returncode == 0, "the process came to its own end"


def test_the_stop_file_is_looked_at_and_the_request_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "POLL_SECONDS", 0.0)
    requests = StopRequests(stop_file=tmp_path / "stop")
    assert requests.poll() == 0
    (tmp_path / "stop").mkdir()
    assert requests.poll() == 0, "a folder of that name is no request"
    (tmp_path / "stop").rmdir()
    (tmp_path / "stop").touch()
    assert describe(requests.poll()) == "the stop file"
    (tmp_path / "stop").unlink()
    assert describe(requests.poll()) == "the stop file"


def test_the_stop_file_is_not_looked_at_in_every_step(tmp_path):
    requests = StopRequests(stop_file=tmp_path / "stop")
    requests.poll()
    (tmp_path / "stop").touch()
    assert requests.poll() == 0, "a network file system is not asked before its time"


def test_wall_time_counts_from_the_start_of_the_process():
    assert StopRequests(max_wall_minutes=60.0, began=time.monotonic() - 3500).poll() == 0
    late = StopRequests(max_wall_minutes=60.0, began=time.monotonic() - 3601)
    assert describe(late.poll()) == "training.max_wall_minutes"


def test_a_launcher_that_ends_is_noticed(monkeypatch):
    monkeypatch.setattr(stopping, "POLL_SECONDS", 0.0)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    requests = StopRequests(launchers=[Process(child.pid, stopping._stat(child.pid)[1])])
    assert requests.poll() == 0
    child.kill()
    child.wait()
    assert describe(requests.poll()) == "its launcher has ended"


def test_a_process_number_used_again_is_another_process():
    assert Process(os.getpid(), stopping._stat(os.getpid())[1]).lives()
    assert not Process(os.getpid(), "1").lives()


SHOWN = """
    import os, subprocess, sys
    from recap_ds.train.stopping import find_launchers
    print([launcher.pid == os.getppid() for launcher in find_launchers()])
"""


@pytest.mark.parametrize("module", ["deepspeed/launcher/launch", "torch/distributed/run"])
def test_launchers_are_known_by_their_module(module, tmp_path):
    fake = tmp_path / f"{module}.py"
    fake.parent.mkdir(parents=True)
    for package in fake.parents:
        if package == tmp_path:
            break
        (package / "__init__.py").touch()
    fake.write_text("import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]], check=True)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    command = [sys.executable, "-u", "-m", module.replace("/", "."), textwrap.dedent(SHOWN)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[True]\n", done.stderr


def test_a_shell_or_another_program_above_is_no_launcher():
    assert find_launchers() == [], "pytest starts no ranks"
    done = run_python(SHOWN)
    assert done.stdout == "[]\n", done.stderr
