"""One process's copy of the index, put together from its settings."""

from collections.abc import Callable
from dataclasses import dataclass

from redis.asyncio import Redis

from headrace.clock import Clock
from headrace.core.block import BlockHash
from headrace.index.config import IndexConfig
from headrace.index.connection import RedisConfig, connect, disconnect
from headrace.index.log import IndexLog
from headrace.index.prefix_index import PrefixIndex
from headrace.index.replica import IndexReplica


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexCopy:
    """A copy of the index and what keeps it current.

    Attributes:
        index: Asked for prefixes; only the replica changes it.
        replica: Run `replica.run` in a task group.
        redis: Its connection; call `close` at the end.
    """

    index: PrefixIndex
    replica: IndexReplica
    redis: Redis

    async def close(self) -> None:
        """Give the connection up."""
        await disconnect(self.redis)


def open_log(redis: RedisConfig, config: IndexConfig) -> tuple[IndexLog, Redis]:
    """Return the log of a cluster and the connection it uses; nothing is sent yet.

    Raises:
        ConfigError: the settings of the connection are wrong.
    """
    client = connect(redis)
    return IndexLog(client, prefix=config.key_prefix, forget_after_s=config.forget_after_s), client


def open_copy(
    redis: RedisConfig,
    config: IndexConfig,
    clock: Clock,
    on_quarantine: Callable[[tuple[BlockHash, ...]], None] | None = None,
) -> IndexCopy | None:
    """Return a copy of the index, empty until its replica runs; None where no Redis is named.

    Args:
        redis: Where the log is.
        config: How large the copy may become.
        clock: Measures ages.
        on_quarantine: Called with blocks that every holder has to let go of.

    Raises:
        ConfigError: the settings of the connection are wrong.
    """
    if redis.url is None:
        return None
    log, client = open_log(redis, config)
    index = PrefixIndex(config.budget_bytes, config.max_locations)
    return IndexCopy(index=index, replica=IndexReplica(log, index, clock, on_quarantine=on_quarantine), redis=client)
