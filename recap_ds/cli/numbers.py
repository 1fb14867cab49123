"""Whole numbers on the command line; anything else is argparse's one line."""

import argparse


def count(text: str) -> int:
    return _whole_number(text, at_least=1)


def seed(text: str) -> int:
    return _whole_number(text, at_least=0)


def _whole_number(text: str, at_least: int) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < at_least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {at_least}")
    return int(text)
