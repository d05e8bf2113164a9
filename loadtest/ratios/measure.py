"""Requests that benchmarks send, and what they time."""

import asyncio
import time
from collections.abc import Sequence

import numpy as np

from headrace import AsyncClient

FIRST_WORD_TOKEN = 1000
LAST_WORD_TOKEN = 40000


def fresh_tokens(seed: int, count: int) -> list[int]:
    """Return tokens that no other seed shares a prefix with."""
    drawn = np.random.default_rng(seed).integers(FIRST_WORD_TOKEN, LAST_WORD_TOKEN, count)
    return [int(token) for token in drawn]


async def token_times(address: str, prompt: Sequence[int], num_tokens: int) -> list[float]:
    """Return the seconds from sending a request to each of its tokens."""
    times: list[float] = []
    async with AsyncClient(address) as client:
        await client.models()  # The connection is part of no figure.
        begun_s = time.perf_counter()
        async with client.stream(prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True) as stream:
            async for piece in stream:
                times += [time.perf_counter() - begun_s] * len(piece.tokens)
    return times


def seconds_to_token(address: str, prompt: Sequence[int], index: int) -> float:
    """Return the seconds from sending a request to its token `index`, from 0."""
    return asyncio.run(token_times(address, prompt, index + 1))[index]
