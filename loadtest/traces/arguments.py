"""What the command lines of generators share: types of arguments, and what becomes of a trace. Bad ones exit with 2."""

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from contexts import Event, write


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


def deliver(
    parser: argparse.ArgumentParser,
    trace: Path | None,
    generate: Callable[[], tuple[Event, ...]],
    figures: Callable[[tuple[Event, ...]], Mapping[str, float]],
) -> None:
    """Generate a trace and write it, or print its figures if there is no file to write."""
    try:
        events = generate()
        if trace is not None:
            write(trace, events)
            return
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name, value in figures(events).items():
        print(f"{name}: {value:,.3f}")
