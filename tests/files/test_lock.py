"""One process at a time, whatever becomes of it."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from recap_ds.errors import UsageError
from recap_ds.files.lock import exclusive

HOLDER = """
import sys, time
from pathlib import Path
from recap_ds.files.lock import exclusive
with exclusive(Path(sys.argv[1]), "it", print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_lets_go(tmp_path):
    path = tmp_path / "new" / ".t.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    said = rf"^it: another process works on it \(host .*, process {holder.pid}\)"
    with pytest.raises(UsageError, match=said), exclusive(path, "it", print):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with exclusive(path, "it", print):
        assert path.read_text().endswith(f"process {os.getpid()}\n")
    with exclusive(path, "it", print):
        pass


def test_a_file_system_without_locks_is_said_and_worked_on(tmp_path, monkeypatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lines = []
    with exclusive(tmp_path / "lock", "--tag t", lines.append):
        (line,) = lines
    assert line.startswith(f"{tmp_path / 'lock'}: this file system keeps no locks") and "--tag t" in line


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"), exclusive(tmp_path / "file" / "lock", "it", print):
        pass
