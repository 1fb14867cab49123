"""Numbers on the command line; anything else is argparse's one line."""

import argparse

MAX_LISTED = 2**20  # dims or episodes of a list such as 0-5


def count(text: str) -> int:
    return _whole_number(text, at_least=1)


def seed(text: str) -> int:
    return _whole_number(text, at_least=0)


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def ranges(text: str) -> tuple[int, ...]:
    """ "0-2,5" -> (0, 1, 2, 5)."""
    dims: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        ends = (first, last or first)
        if not all(end.isdecimal() for end in ends) or int(ends[1]) < int(ends[0]) or int(ends[1]) >= MAX_LISTED:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 0-5 or 0,1,2")
        dims += range(int(ends[0]), int(ends[1]) + 1)
    return tuple(dict.fromkeys(dims))


def _whole_number(text: str, at_least: int) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < at_least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {at_least}")
    return int(text)
