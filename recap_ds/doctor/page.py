"""The doctor's page: one line per finding, ok, warn or fail, and what to do where it is not ok."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

Level = Literal["ok", "warn", "fail"]
SUBJECT_WIDTH = 18


class Finding(NamedTuple):
    level: Level
    subject: str
    what: str
    mend: str = ""  # what the user can do, where ``what`` does not say it already

    def __str__(self) -> str:
        mend = f"; {self.mend}" if self.mend else ""
        return f"{self.level:<5} {self.subject:<{SUBJECT_WIDTH}} {' '.join((self.what + mend).split())}"


def ok(subject: str, what: str) -> Finding:
    return Finding("ok", subject, what)


def warn(subject: str, what: str, mend: str) -> Finding:
    return Finding("warn", subject, what, mend)


def fail(subject: str, what: str, mend: str = "") -> Finding:
    return Finding("fail", subject, what, mend)


def closing_line(findings: Iterable[Finding]) -> str:
    levels = [finding.level for finding in findings]
    return ", ".join(f"{levels.count(level)} {level}" for level in ("ok", "warn", "fail"))


def exit_code(findings: Iterable[Finding]) -> int:
    """1 where something failed: a run would not start, or not end well."""
    return int(any(finding.level == "fail" for finding in findings))
