"""Publishers and replicas of the index as tests start and stop them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from headrace.core.block import BlockHash
from headrace.core.placement import EXACT, Origin, Tier
from headrace.index.events import Change, ChangeKind

POLL_S = 0.002
PATIENCE_S = 15.0


def block(number: int) -> BlockHash:
    """Return a hash."""
    return BlockHash(number.to_bytes(16, "big"))


def stored(numbers: Iterable[int], tier: Tier = Tier.DEVICE, origin: Origin = EXACT) -> Change:
    """Return the change that blocks came."""
    return Change(kind=ChangeKind.STORED, tier=tier, origin=origin, hashes=tuple(map(block, numbers)))


def removed(numbers: Iterable[int], tier: Tier = Tier.DEVICE) -> Change:
    """Return the change that blocks left."""
    return Change(kind=ChangeKind.REMOVED, tier=tier, hashes=tuple(map(block, numbers)))


async def until(is_true: Callable[[], bool], what: str = "") -> None:
    """Wait for something to become true.

    Raises:
        AssertionError: it does not within `PATIENCE_S`.
    """
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not is_true():  # noqa: ASYNC110, what is waited for happens in other processes
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        raise AssertionError(f"never true: {what or is_true}") from error


@contextlib.asynccontextmanager
async def running(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run coroutines meanwhile; their failures are those of the test."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
        yield
        for task in tasks:
            task.cancel()
