"""The launch scripts against programs that only say how they were called: arguments, ports, exit codes, wrong input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.harness import LAUNCHER_VARIABLES, REPOSITORY

SINGLE, MULTI, RETRY = (str(REPOSITORY / "launch" / name) for name in ("single_node.sh", "multi_node.sh", "retry.sh"))
# What a shell, pdsh or DeepSpeed would change if it could.
ODD_WORDS = ["p.py", "a b", "x={y: 1, z: 'q'}", "$HOME;`id`", "100%d %h", 'caf\u00e9"\\', "", "[*]", "lr=1e-4", "a\nb"]
SAY = """#!{python}
import json, os, sys
print(json.dumps({{"words": sys.argv[1:], "environment": dict(os.environ)}}))
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def programs(tmp_path) -> Path:
    """A PATH on which ``deepspeed`` tells how it was called, and ``ssh HOST COMMAND`` stays here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_program(folder / "deepspeed", SAY.format(python=sys.executable))
    write_program(folder / "ssh", '#!/bin/bash\n[[ $* != *unreachable* ]] || exit 255\nexec sh -c "${@: -1}"\n')
    write_program(folder / "pdsh", "#!/bin/sh\n")
    return folder


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def call(programs: Path, *words: str, cwd: Path | None = None, **settings: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in (*LAUNCHER_VARIABLES, "DS_ENV_FILE")}
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = clean | {"PATH": path, "HOME": str(programs)} | settings
    folder = cwd or programs.parent
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def said(done: subprocess.CompletedProcess) -> tuple[list[str], dict[str, str]]:
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    return answer["words"], answer["environment"]


def refusal(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def hostfile(folder: Path, text: str = "# nodes\n\nnode-0 slots=8\nnode-1 slots=8\n") -> str:
    path = folder / "my hosts"
    path.write_text(text)
    return str(path)


def test_one_node_passes_every_word_on_and_keeps_the_exit_code(programs):
    done = call(programs, SINGLE, *ODD_WORDS, CODE="75")
    words, _ = said(done)
    assert done.returncode == 75
    assert words[:3] == ["--hostfile", "/dev/null", "--master_port"] and 1024 <= int(words[3]) < 65536
    assert words[4:] == ODD_WORDS


def test_one_node_obeys_its_settings(programs):
    words, _ = said(call(programs, SINGLE, "p.py", NUM_GPUS="3", MASTER_PORT="29876"))
    assert words[2:] == ["--num_gpus", "3", "--master_port", "29876", "p.py"]


def test_two_free_ports_differ(programs):
    ports = {said(call(programs, SINGLE, "p.py"))[0][3] for _ in range(3)}
    assert len(ports) > 1


@pytest.mark.parametrize("script", [SINGLE, MULTI])
def test_a_program_must_be_named(programs, script):
    assert "name the program" in refusal(call(programs, script))


def test_several_nodes_get_words_that_survive_the_remote_shell(programs, tmp_path):
    hosts = hostfile(tmp_path)
    words, environment = said(
        call(programs, MULTI, *ODD_WORDS, HOSTFILE=hosts, SSH_PORT="2222", MASTER_ADDR="10.0.0.1")
    )
    assert words[:7] == ["--hostfile", hosts, "--force_multi", "--launcher", "pdsh", "--ssh_port", "2222"]
    assert words[7:10] == ["--master_addr", "10.0.0.1", "--master_port"] and 1024 <= int(words[10]) < 65536
    # DeepSpeed quotes words with a space once more, and pdsh replaces %h: neither may find anything to do.
    assert not any(" " in word or "%" in word for word in words[11:])
    shell = f'for word in {" ".join(words[11:])}; do printf "%s\\0" "$word"; done'
    assert subprocess.run(["bash", "-c", shell], capture_output=True).stdout.decode().split("\0")[:-1] == ODD_WORDS
    assert "ServerAliveInterval=16" in environment["PDSH_SSH_ARGS_APPEND"]


def test_without_ssh_each_node_is_told_its_rank_and_gets_the_environment_files(programs, tmp_path):
    (tmp_path / "cluster.env").write_text("NCCL_SOCKET_IFNAME=ib0\nNOTE=a b;c*\nLAST=no newline")
    settings = {"HOSTFILE": hostfile(tmp_path), "NODE_RANK": "1", "DS_ENV_FILE": "cluster.env"}
    done = call(programs, MULTI, *ODD_WORDS, CODE="75", **settings)
    words, environment = said(done)
    assert done.returncode == 75
    expected = ["--no_ssh", "--node_rank", "1", "--master_addr", "node-0", "--master_port", "29500"]
    assert words[2:] == expected + ODD_WORDS
    assert environment["NCCL_SOCKET_IFNAME"] == "ib0" and environment["NOTE"] == "a b;c*"
    assert environment["LAST"] == "no newline"


@pytest.mark.parametrize(
    "line", ["", "# InfiniBand", "1X=2", "NCCL_DEBUG", 'A="b"', "A='b'", "A=$HOME", "A=b\r", "A=%h"]
)
@pytest.mark.parametrize("settings", [{}, {"NODE_RANK": "0"}])
def test_environment_files_that_would_end_or_change_in_the_launcher_are_refused(programs, tmp_path, line, settings):
    (tmp_path / ".deepspeed_env").write_bytes(f"GOOD=1\n{line}\nGOOD=2\n".encode())
    told = refusal(call(programs, MULTI, "p.py", HOSTFILE=hostfile(tmp_path), **settings))
    assert "./.deepspeed_env, line 2" in told and "NAME=value" in told


def test_the_home_folder_s_environment_file_is_read_first(programs, tmp_path):
    (programs / ".deepspeed_env").write_text("WHERE=home\nHOME_ONLY=1\n")
    (tmp_path / ".deepspeed_env").write_text("WHERE=here\n")
    _, environment = said(call(programs, MULTI, "p.py", HOSTFILE=hostfile(tmp_path), NODE_RANK="0"))
    assert environment["WHERE"] == "here" and environment["HOME_ONLY"] == "1"


def test_wrong_host_files_and_folders_are_named(programs, tmp_path):
    assert "there is no hostfile 'launch/hostfile'" in refusal(call(programs, MULTI, "p.py"))
    empty = hostfile(tmp_path, "# none yet\n")
    assert "names no machine" in refusal(call(programs, MULTI, "p.py", HOSTFILE=empty))
    away = hostfile(tmp_path, "unreachable slots=8\n")
    assert "ssh to 'unreachable'" in refusal(call(programs, MULTI, "p.py", HOSTFILE=away))
    spaced = tmp_path / "my folder"
    spaced.mkdir()
    assert "does not survive pdsh" in refusal(call(programs, MULTI, "p.py", HOSTFILE=away, cwd=spaced))


@pytest.mark.parametrize("rank", ["2", "-1", "one", "01"])
def test_a_node_s_number_is_one_of_the_hostfile(programs, tmp_path, rank):
    told = refusal(call(programs, MULTI, "p.py", HOSTFILE=hostfile(tmp_path), NODE_RANK=rank))
    assert f"NODE_RANK={rank}: the 2 machine(s)" in told


def test_settings_that_mean_nothing_are_refused(programs, tmp_path):
    absent = refusal(call(programs, MULTI, "p.py", HOSTFILE=hostfile(tmp_path), DS_ENV_FILE="absent"))
    assert "DS_ENV_FILE: there is no file 'absent'" in absent
    assert "RETRIES=many is not a whole number" in refusal(call(programs, RETRY, "true", RETRIES="many"))


@pytest.mark.parametrize("missing", ["deepspeed", "pdsh"])
def test_missing_programs_are_named(programs, tmp_path, missing):
    (programs / missing).unlink()
    for name in ("bash", "awk", "dirname", "python"):
        (programs / name).symlink_to(f"/usr/bin/{name}" if name != "python" else sys.executable)
    done = call(programs, MULTI, "p.py", HOSTFILE=hostfile(tmp_path), PATH=str(programs))
    assert f"there is no '{missing}' on the PATH" in refusal(done)


@pytest.mark.parametrize(
    ("codes", "ends_with", "calls"),
    [([0], 0, 1), ([1, 255, 0], 0, 3), ([1, 75], 75, 2), ([2], 2, 1), ([143], 143, 1), ([1, 9, 7, 0], 7, 3)],
)
def test_retry_goes_on_after_failures_only(programs, tmp_path, codes, ends_with, calls):
    (tmp_path / "codes").write_text("\n".join(map(str, codes)))
    write_program(
        programs / "job", '#!/bin/bash\nread -r c <codes; sed -i 1d codes; printf "%s\\n" "$@" >>calls; exit "$c"\n'
    )
    done = call(programs, RETRY, "job", "a b", RETRIES="2", PAUSE_SECONDS="0")
    assert done.returncode == ends_with
    assert (tmp_path / "calls").read_text().splitlines() == ["a b"] * calls
    assert len(done.stderr.splitlines()) == calls - 1
