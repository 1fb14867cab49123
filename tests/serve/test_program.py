"""``recap-ds serve`` as a program: how it ends, and what it refuses in one line."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from recap_ds.cli.main import main
from recap_ds.errors import RunFailed
from tests.serve.made import request, right_answer

pytest.importorskip("websockets", reason="pip install 'recap_ds[serve]'")
pytest.importorskip("msgpack", reason="pip install 'recap_ds[serve]'")

from recap_ds.serve.client import PolicyClient

HOST = "127.0.0.1"


def start_program(export, *flags):
    command = [sys.executable, "-m", "recap_ds.cli.main", "serve", str(export), "--port", "0", "--device", "cpu"]
    program = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = program.stdout.readline()
    assert said.startswith(f"serving {export} in float32 on cpu: ws://127.0.0.1:"), program.communicate()
    return program, int(said.rsplit(":", 1)[1])


def test_sigterm_ends_it_well(export, robot):
    program, port = start_program(export)
    replies = []

    def ask_until_it_ends():
        with PolicyClient(HOST, port) as busy, contextlib.suppress(RunFailed):
            replies.extend(busy.infer(request(number)) for number in itertools.count())

    try:
        with PolicyClient(HOST, port) as idle:
            busy_thread = threading.Thread(target=ask_until_it_ends)
            busy_thread.start()
            while not replies:
                time.sleep(0.01)
            program.send_signal(signal.SIGTERM)
            said, problems = program.communicate(timeout=60)
            busy_thread.join()
            with pytest.raises(RunFailed, match="1001"):
                idle.infer(request(0))
    finally:
        program.kill()
    assert (program.returncode, problems) == (0, "")
    # Everything that was answered has arrived.
    assert said.splitlines()[-1].startswith(f"{len(replies)} requests of 2 clients answered; 0 requests and 0 clients")
    np.testing.assert_array_equal(replies[-1]["actions"], right_answer(robot, request(len(replies) - 1)))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: is reached from other machines; give --api-key"),
        (["--host", "robot.example"], "give --api-key"),
        (["--host", "::", "--api-key", "short"], "--api-key: give at least 16 printable characters"),
        (["--api-key", "schlüssel-schlüssel"], "--api-key: give at least 16 printable characters"),
        (["--port", "65536"], "'65536' is not a port"),
        (["--max-batch", "0"], "'0' is not a whole number of at least 1"),
        (["--max-message", "1"], "--max-message 1: give a size"),
        (["--device", "abacus"], "--device abacus: cannot be used here"),
    ],
)
def test_wrong_flags_are_one_line(export, flags, said, capsys):
    assert main(["serve", str(export), *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(export, port, capsys):
    assert main(["serve", str(export), "--port", str(port), "--device", "cpu"]) == 1
    assert f"127.0.0.1:{port}: cannot be listened on" in capsys.readouterr().err


def test_without_its_packages_it_says_what_to_install(export, tmp_path):
    """An interpreter that cannot see websockets."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'websockets' else find(name, *more)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "recap_ds.cli.main", "serve", str(export)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: recap-ds serve: needs websockets; pip install -e '.[serve]' brings what it needs\n"
