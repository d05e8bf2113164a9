"""The kvstore as a location of the shared index, and its copy of it."""

import asyncio
from collections.abc import Callable, Sequence

from redis.asyncio import Redis

from headrace.clock import Clock
from headrace.core.block import BlockHash
from headrace.index.connection import disconnect
from headrace.index.copy import IndexCopy, open_copy, open_log
from headrace.index.events import Change
from headrace.index.log import Lifetime
from headrace.index.prefix_index import PrefixMatch
from headrace.index.publisher import IndexPublisher
from headrace.index.vllm_feeds import VllmFeeds
from headrace.kvstore.config import KvStoreConfig


class StoreIndex:
    """Publishes what the kvstore holds and follows what everybody publishes.

    Args:
        copy: What is followed.
        publisher: Of the own blocks.
        feeds: Of engines that are none of ours.
        redis: The connection of both.

    Attributes:
        copy: See above.
        feeds: See above.
    """

    def __init__(self, copy: IndexCopy, publisher: IndexPublisher, feeds: VllmFeeds, redis: Redis) -> None:
        self.copy = copy
        self.feeds = feeds
        self._publisher = publisher
        self._redis = redis

    @property
    def is_connected(self) -> bool:
        """Whether blocks that are noted now should soon be found in the copy."""
        state = self.copy.replica.state()
        return self._publisher.is_connected and state.is_connected and state.is_synced

    def note(self, changes: Sequence[Change]) -> None:
        """Publish changes soon."""
        self._publisher.note(changes)

    def match(self, hashes: Sequence[BlockHash]) -> list[PrefixMatch]:
        """Return how many leading blocks each location holds, whatever the settings upstream of them."""
        return self.copy.index.match(hashes)

    async def run(self) -> None:
        """Publish and follow until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._publisher.run())
            tasks.create_task(self.copy.replica.run())
            tasks.create_task(self.feeds.run())

    async def close(self) -> None:
        """Leave the index and give both connections up; `run` was cancelled before."""
        await self._publisher.leave()
        await self.feeds.close()
        await disconnect(self._redis)
        await self.copy.close()


def open_index(
    config: KvStoreConfig, epoch: str, clock: Clock, on_quarantine: Callable[[tuple[BlockHash, ...]], None]
) -> StoreIndex | None:
    """Return the kvstore's part in the index; None where no Redis is named.

    Raises:
        ConfigError: the settings of the connection are wrong.
    """
    copy = open_copy(config.redis, config.index, clock, on_quarantine)
    if copy is None:
        return None
    log, redis = open_log(config.redis, config.index)
    life = Lifetime(location=config.name, epoch=epoch, started_unix_ms=clock.unix_ms())
    feeds = VllmFeeds(config.vllm_feeds, log, clock, copy.replica.knows)
    return StoreIndex(copy, IndexPublisher(log, life, clock), feeds, redis)
