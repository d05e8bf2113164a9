"""Work on long texts without stopping the event loop."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

INLINE_CHARS = 8_000
"""Longer texts are worked on in a thread (2 ms and more)."""

Result = TypeVar("Result")


async def off_loop(num_chars: int, work: Callable[[], Result], inline_chars: int = INLINE_CHARS) -> Result:
    """Return what `work` returns; large texts are worked on in a thread, so that streams go on."""
    if num_chars <= inline_chars:
        return work()
    return await asyncio.to_thread(work)
