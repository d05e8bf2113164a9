"""Importing much at once."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_off() -> Iterator[None]:
    """Import without the garbage collector, and spare what was imported its later passes.

    Modules live as long as the process, but the collector looks through them over and over while they grow: 0.3 of
    the 2.3 s that torch takes to import, and after that in every full pass (2 cores, 2026-11-21).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
