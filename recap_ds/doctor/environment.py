"""The files whose NAME=value lines DeepSpeed's launcher gives every rank of a job on several nodes: ``.deepspeed_env``.

It dies of a blank line or a comment, and the shell over there expands ``$`` and quotes; ``launch/multi_node.sh``
refuses the same.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from recap_ds.doctor.page import Finding, fail, ok

_LINE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^'\"$`\\%\r]*")


def environment_files(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Those there are, in the order in which later lines win."""
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    places = dict.fromkeys([Path.home() / name, Path.cwd() / name])  # an absolute name is one place
    return [path for path in places if path.is_file()]


def environment_variables(files: list[Path]) -> dict[str, str]:
    """What sound files say; lines that are not are left to ``environment_finding``."""
    lines = [line for path in files for line in _lines(path) if _LINE.fullmatch(line)]
    return dict(line.split("=", 1) for line in lines)


def environment_finding(files: list[Path], environ: Mapping[str, str] = os.environ) -> Finding:
    for path in files:
        for number, line in enumerate(_lines(path), start=1):
            if not _LINE.fullmatch(line):
                mend = "write NAME=value alone: no blank lines, comments, quotes, Windows line ends, %, $, ` or \\"
                return fail("environment", f"{path}, line {number}: {line!r} ends or changes in the launcher", mend)
    if not files:
        if name := environ.get("DS_ENV_FILE"):
            return fail("environment", f"DS_ENV_FILE names {name}, which is not there", "correct the path, or unset it")
        return ok("environment", "no .deepspeed_env")
    names = ", ".join(environment_variables(files)) or "nothing"
    return ok("environment", f"{', '.join(map(str, files))} set(s) {names}")


def _lines(path: Path) -> list[str]:
    text = path.read_bytes().decode(errors="replace")  # as it is, Windows line ends too
    return text.removesuffix("\n").split("\n") if text else []
