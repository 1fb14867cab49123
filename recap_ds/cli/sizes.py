"""Sizes and counts as people write them: 5GB, 512MiB, 300M."""

import math
import re

from recap_ds.errors import UsageError

_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_bytes(flag: str, text: str, least: int, most: int) -> int:
    """Bytes of ``5GB`` (10**9, as on the hub) or ``5GiB`` (2**30); ``flag`` is for the error."""
    return _parse(text, _BYTES, least, most, f"{flag} {text}: give a size such as 5GB or 512MiB")


def parse_count(flag: str, text: str, least: int, most: int) -> int:
    """A count such as 2000000, 300M or 1.5B."""
    return _parse(text, _COUNTS, least, most, f"{flag} {text}: give a count such as 300M or 1.5B")


def _parse(text: str, units: dict[str, int], least: int, most: int, advice: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match.group(2).upper() not in units:
        raise UsageError(advice)
    value = float(match.group(1)) * units[match.group(2).upper()]
    if not least <= value <= most or not math.isfinite(value):
        raise UsageError(f"{advice}, from {least:,} to {most:,}")
    return int(value)
