"""Text into tokens without stopping the event loop, for both front doors."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from headrace.core.validate import RequestLimits, check_prompt_length
from headrace.router.frontend import ServedModel

INLINE_CHARS = 8_000
"""Longer texts are worked on in a thread (2 ms and more)."""

Result = TypeVar("Result")


async def off_loop(num_chars: int, work: Callable[[], Result], inline_chars: int = INLINE_CHARS) -> Result:
    """Return what `work` returns; large texts are worked on in a thread, so that streams go on."""
    if num_chars <= inline_chars:
        return work()
    return await asyncio.to_thread(work)


def refuse_long_text(model: ServedModel, texts: Sequence[str], name: str, limits: RequestLimits) -> None:
    """Refuse text that cannot fit the context before time goes into tokenizing it.

    Raises:
        InvalidRequest: the texts together are too long for the context.
    """
    num_tokens = sum(model.text.min_num_tokens(text) for text in texts)
    check_prompt_length(num_tokens, limits, name=name)
