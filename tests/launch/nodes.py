"""Two machines on one: network namespaces with an address, an sshd and nothing else in common but the files.

A veth pair is the cable between them. It ends in the two namespaces, so nothing here can reach any real network.
Needs root, iproute2, OpenSSH and pdsh; ``missing()`` says what is not there.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

NAMES = ("a", "b")
ADDRESSES = ("198.51.100.1", "198.51.100.2")  # TEST-NET-2: documentation's own, routed nowhere
PREFIX = "recapds"
SSHD = "/usr/sbin/sshd"
SSHD_FOLDER = Path("/run/sshd")  # sshd insists on it


def missing() -> str | None:
    """What two nodes need and this machine lacks; None where all is there."""
    if os.geteuid() != 0:
        return "needs root (network namespaces)"
    for program in ("ip", "ssh", "ssh-keygen", "pdsh", SSHD):
        if shutil.which(program) is None:
            return f"needs {program} (apt-get install iproute2 openssh-client openssh-server pdsh)"
    probe = subprocess.run(["ip", "netns", "exec", "no-such-namespace", "true"], capture_output=True, text=True)
    if "Operation not permitted" in probe.stderr:
        return "this machine allows no network namespaces"
    return None


class TwoNodes:
    """``with TwoNodes(folder) as nodes: nodes.popen(0, [...])``. Everything it made is gone afterwards."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.namespaces = [f"{PREFIX}{os.getpid()}{name}" for name in NAMES]
        self.hostfile = folder / "hostfile"
        self._servers: list[subprocess.Popen] = []
        self._made_folder = False

    def __enter__(self) -> "TwoNodes":
        _remove_left_over()
        self._on_term = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(SystemExit(143)))
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        signal.signal(signal.SIGTERM, self._on_term)

    def _start(self) -> None:
        for namespace in self.namespaces:
            _ip("netns", "add", namespace)
        one, two = self.namespaces
        _ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", two)
        for namespace, address in zip(self.namespaces, ADDRESSES, strict=True):
            _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                _ip("-n", namespace, "link", "set", link, "up")
        self._made_folder = not SSHD_FOLDER.exists()
        SSHD_FOLDER.mkdir(mode=0o755, exist_ok=True)
        for name in ("host_key", "user_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(command, check=True)
        self._write_files()
        for node in range(2):
            with (self.folder / f"sshd_{node}.log").open("w") as log:
                server = [SSHD, "-D", "-e", "-f", str(self.folder / f"sshd_config_{node}")]
                self._servers.append(subprocess.Popen(self._inside(node, server), stdout=log, stderr=log))
        for node in range(2):
            self._wait_for_ssh(node)

    def _write_files(self) -> None:
        for node, address in enumerate(ADDRESSES):
            lines = (
                f"ListenAddress {address}:22",
                f"HostKey {self.folder}/host_key",
                f"AuthorizedKeysFile {self.folder}/user_key.pub",
                "PermitRootLogin yes",
                "StrictModes no",
                "UsePAM no",
                "PidFile none",
            )
            (self.folder / f"sshd_config_{node}").write_text("\n".join(lines) + "\n")
        lines = (f"IdentityFile {self.folder}/user_key", "StrictHostKeyChecking no", "LogLevel ERROR")
        config = "\n".join((*lines, f"UserKnownHostsFile {self.folder}/known_hosts", ""))
        (self.folder / "ssh_config").write_text(config)
        # Stands for what a user has in ~/.ssh: ssh finds that by the account, not by HOME.
        wrapper = self.folder / "bin" / "ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F "{self.folder}/ssh_config" "$@"\n')
        wrapper.chmod(0o755)
        self.hostfile.write_text("# two nodes\n" + "".join(f"{address} slots=1\n" for address in ADDRESSES))

    def _wait_for_ssh(self, node: int) -> None:
        deadline = time.monotonic() + 30
        while self.popen(node, ["ssh", ADDRESSES[node], "true"], stderr=subprocess.DEVNULL).wait():
            if time.monotonic() > deadline:
                raise RuntimeError((self.folder / f"sshd_{node}.log").read_text())
            time.sleep(0.2)

    def _inside(self, node: int, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.namespaces[node], *command]

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", **more}

    def popen(self, node: int, command: list[str], environment: dict[str, str] | None = None, **keywords: object):
        """Start ``command`` on a node, in a process group of its own."""
        environment = environment or self.environment()
        return subprocess.Popen(self._inside(node, command), env=environment, start_new_session=True, **keywords)

    def cut(self) -> None:
        """Pull the cable out of the second node."""
        _ip("-n", self.namespaces[1], "link", "set", "cable", "down")

    def mend(self) -> None:
        _ip("-n", self.namespaces[1], "link", "set", "cable", "up")

    def processes(self) -> list[str]:
        """Command lines of what runs on the nodes, without the ssh servers."""
        lines = []
        for pid in _pids(self.namespaces):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:  # it has just ended
                continue
            if line and not line.startswith(("sshd", SSHD, "ip netns")):
                lines.append(line)
        return lines

    def stop(self) -> None:
        for pid in _pids(self.namespaces):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for server in self._servers:
            server.wait()
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
        if self._made_folder:
            SSHD_FOLDER.rmdir()


def _pids(namespaces: list[str]) -> list[int]:
    """Processes inside our own namespaces: only what was started there."""
    found: list[int] = []
    for namespace in namespaces:
        listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
        found += [int(word) for word in listed.stdout.split()]
    return found


def _remove_left_over() -> None:
    """Namespaces of a test process that was killed and is no more."""
    for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines():
        name = line.split()[0] if line.split() else ""
        owner = name.removeprefix(PREFIX)[:-1]
        if name.startswith(PREFIX) and owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            for pid in _pids([name]):
                os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
