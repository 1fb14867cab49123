"""What a rank leaves behind when it fails: runs/<name>/failures/rank_N.txt.

Added to, never begun anew: what happened at an earlier start of the run stays. Only a rank that fails writes here, and
on stderr where the disk refuses.
"""

import faulthandler
import sys
import traceback
from datetime import datetime, timezone
from pathlib import Path


class FailureLog:
    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.path = folder / f"rank_{rank}.txt"

    def stacks(self, why: str) -> None:
        """What every thread of this process is doing."""
        try:
            self._add(why, "")
            with self.path.open("a") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)

    def exception(self, why: str, error: BaseException, notes: str = "") -> None:
        text = "".join(traceback.format_exception(error)) + notes
        try:
            self._add(why, text)
        except OSError:  # the disk may be what failed
            print(text, file=sys.stderr)

    def _add(self, why: str, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n=== {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC: {why}\n{text}")
