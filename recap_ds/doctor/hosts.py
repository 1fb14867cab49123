"""The machines of a hostfile: does ssh reach each without a password, and is each what the first one is?

Every rank writes its part of a checkpoint into one folder and every node reads the shards, so the paths must be the
same files everywhere: a token file made here is looked for there.
"""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from recap_ds.doctor.node import NodeFacts
from recap_ds.doctor.page import Finding, fail, ok, warn
from recap_ds.errors import UsageError

CONNECT_SECONDS = 15
PROBE_SECONDS = 180  # importing torch from a network disk the first time takes its time
MAX_CLOCK_SECONDS = 5.0
# Names that ssh and pdsh take for nothing but a name.
_LINE = re.compile(r"(\w[\w.:@-]*)\s+slots=([1-9]\d{0,3})", re.ASCII)


class Host(NamedTuple):
    name: str
    slots: int


def read_hostfile(path: str | Path) -> list[Host]:
    """As DeepSpeed reads it, but strictly. UsageError names the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--hostfile {path}: cannot be read ({reason}); see launch/hostfile.example") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise UsageError(f"--hostfile {path}, line {number}: '{text}' is not like 'node-0 slots=8'")
        if match[1] in [host.name for host in hosts]:
            raise UsageError(f"--hostfile {path}, line {number}: '{match[1]}' is listed twice; give it one line")
        hosts.append(Host(match[1], int(match[2])))
    if not hosts:
        raise UsageError(f"--hostfile {path}: names no machine; write lines like 'node-0 slots=8'")
    return hosts


class Answer(NamedTuple):
    host: Host
    facts: NodeFacts | None
    clock_seconds: float  # how far ahead of ours at least: it was read between question and answer
    problem: Finding | None


def ask_hosts(hosts: Sequence[Host], paths: Sequence[Path], variables: Mapping[str, str]) -> list[Answer]:
    """All at once; in the order of the hostfile. ``paths`` are looked for on each; ``variables``: as ranks get them."""
    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        return list(pool.map(lambda host: _ask(host, paths, variables), hosts))


def _ask(host: Host, paths: Sequence[Path], variables: Mapping[str, str]) -> Answer:
    # The same Python and folder as here: what DeepSpeed's launcher counts on, too.
    words = ["env", *(f"{name}={value}" for name, value in variables.items())]
    words += [sys.executable, "-m", "recap_ds.doctor.node", *(str(path.resolve()) for path in paths)]
    command = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(words)}"
    asked = time.time()
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    try:
        done = subprocess.run(
            [*ssh, host.name, command], capture_output=True, text=True, timeout=PROBE_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        mend = "is its disk or network stuck? try the same command by hand"
        return _no_answer(host, f"no answer within {PROBE_SECONDS} s", mend)
    except FileNotFoundError:
        return _no_answer(host, "there is no 'ssh' on the PATH", "apt-get install openssh-client")
    answered = time.time()
    said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
    if done.returncode == 255:
        return _no_answer(host, f"ssh failed: {said}", f"must work without a password: ssh {host.name} true")
    if done.returncode != 0:
        mend = f"it needs this folder and this Python under the same paths: {Path.cwd()}, {sys.executable}"
        return _no_answer(host, f"recap_ds does not run there: {said}", mend)
    try:
        facts = NodeFacts.from_output(done.stdout)
    except ValueError as error:
        return _no_answer(host, f"gave no answer that is understood here; {error}", "git pull there, and see its shell")
    return Answer(host, facts, facts.time - min(max(facts.time, asked), answered), None)


def _no_answer(host: Host, what: str, mend: str) -> Answer:
    return Answer(host, None, 0.0, fail("hosts", f"{host.name}: {what}", mend))


def host_findings(answer: Answer, first: NodeFacts | None) -> list[Finding]:
    """What is wrong with one machine; an ok line where nothing is.

    ``first``: the first machine that answered. Not the one that asks, which may be a login node without accelerators.
    """
    if answer.problem is not None:
        return [answer.problem]
    host, there = answer.host, answer.facts
    assert there is not None and first is not None
    findings = [fail("hosts", f"{host.name}: {what}", mend) for what, mend in _differences(there, first)]
    have = there.accelerator["count"]
    if there.accelerator["device"] != first.accelerator["device"]:
        other = f"{first.accelerator['device']} on {first.hostname}"
        what = f"{host.name}: its accelerator is {there.accelerator['device']}, {other}"
        findings.append(fail("hosts", what, "look at nvidia-smi there; variables belong into .deepspeed_env"))
    elif there.accelerator["device"] != "cpu" and have < host.slots:
        what = f"{host.name}: {have} accelerator(s), the hostfile says slots={host.slots}"
        findings.append(fail("hosts", what, "correct the hostfile, or see why the others are not visible"))
    missing = [path for path, is_there in there.paths.items() if not is_there]
    if missing:
        what = f"{host.name}: does not see {', '.join(missing)}"
        findings.append(fail("hosts", what, "run folder and shards must be on storage that all nodes share"))
    if not findings:
        kind = "CPU" if there.accelerator["device"] == "cpu" else f"{have} x {there.accelerator['model']}"
        findings.append(ok("hosts", f"{host.name}: reached, {kind}, same packages, source and paths"))
    if abs(answer.clock_seconds) > MAX_CLOCK_SECONDS:
        what = f"{host.name}: its clock is {answer.clock_seconds:+.0f} s off"
        findings.append(warn("hosts", what, "run an NTP service; logs of different nodes do not line up"))
    return findings


def _differences(there: NodeFacts, first: NodeFacts) -> list[tuple[str, str]]:
    found, where = [], first.hostname
    if there.source != first.source:
        what = f"recap_ds's source is another there ({there.source}) than on {where} ({first.source})"
        found.append((what, "git pull on both"))
    other = [f"Python {there.python} ({first.python} on {where})"] if there.python != first.python else []
    for name in sorted({*there.versions, *first.versions}):
        theirs, firsts = there.versions.get(name), first.versions.get(name)
        if theirs != firsts:
            other.append(f"{name} {theirs or 'missing'} ({firsts or 'missing'} on {where})")
    if other:
        mend = f"install the same versions everywhere: pip freeze on {where}, pip install -r there"
        found.append((", ".join(other), mend))
    return found
