"""Types of arguments of the command line: what they raise, argparse says and exits with 2."""

import argparse
import math


def positive(text: str) -> float:
    """Return a number above 0 that is finite."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"not a finite number above 0: {text!r}")
    return number


def at_least_one(text: str) -> int:
    """Return a whole number of 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"not a whole number of 1 or more: {text!r}")
    return number
