"""Tells the rest of the cluster, and readers of vLLM's events, what this worker's cache holds."""

import asyncio
from collections.abc import Iterable
from typing import Protocol

import zmq.asyncio
from redis.asyncio import Redis

from headrace.clock import Clock
from headrace.core.block import BlockHash, root_hash
from headrace.core.placement import DECODED, EXACT, Tier
from headrace.engine.messages import CacheChange
from headrace.index.connection import disconnect
from headrace.index.copy import open_log
from headrace.index.events import Change, ChangeKind
from headrace.index.log import Lifetime
from headrace.index.publisher import IndexPublisher
from headrace.index.vllm_publisher import VllmPublisher
from headrace.worker.config import WorkerConfig
from headrace.worker.digests import BlockDigests


class Publication(Protocol):
    """Somewhere that changes of the cache are told."""

    def note(self, change: CacheChange) -> None:
        """Tell of a change; called on the loop."""
        ...

    def note_corrupt(self, block_hash: BlockHash) -> None:
        """Tell that a block's bytes are wrong, wherever it is."""
        ...

    async def run(self) -> None:
        """Do what has to be done in the background, until cancelled."""
        ...

    async def close(self) -> None:
        """Say that this worker leaves; after `run` was cancelled."""
        ...


class IndexPublication:
    """The global index, in which this worker is a location of device blocks.

    Args:
        publisher: Writes the log.
        redis: Its connection, closed with this.
    """

    def __init__(self, publisher: IndexPublisher, redis: Redis) -> None:
        self._publisher = publisher
        self._redis = redis

    def note(self, change: CacheChange) -> None:
        """Publish soon."""
        self._publisher.note(_changes(change))

    def note_corrupt(self, block_hash: BlockHash) -> None:
        """Make every holder that follows the log let go of a block."""
        self._publisher.note([Change(kind=ChangeKind.QUARANTINED, tier=Tier.DEVICE, hashes=(block_hash,))])

    async def run(self) -> None:
        """Publish until cancelled."""
        await self._publisher.run()

    async def close(self) -> None:
        """Leave the index."""
        await self._publisher.leave()
        await disconnect(self._redis)


class VllmPublication:
    """Events in vLLM's format, for routers that read those.

    Args:
        publisher: Owns the sockets.
        context: Theirs, ended with this.
    """

    def __init__(self, publisher: VllmPublisher, context: zmq.asyncio.Context) -> None:
        self._publisher = publisher
        self._context = context

    def note(self, change: CacheChange) -> None:
        """Publish at once."""
        self._publisher.publish(Tier.DEVICE, stored=change.described, removed=change.removed)

    def note_corrupt(self, block_hash: BlockHash) -> None:
        """Say nothing: the format has no word for it, and that this worker lets go of a block is a change."""

    async def run(self) -> None:
        """Answer requests for replay until cancelled."""
        await self._publisher.run()

    async def close(self) -> None:
        """Close the sockets."""
        self._publisher.close()
        self._context.term()


class Announcer:
    """Hands every change of the cache to whoever must hear of it.

    Args:
        digests: Of own blocks.
        publications: Where else changes are told.
    """

    def __init__(self, digests: BlockDigests, publications: tuple[Publication, ...] = ()) -> None:
        self._digests = digests
        self._publications = publications

    def note(self, change: CacheChange) -> None:
        """Tell of a change; called on the loop."""
        self._digests.forget((*change.stored, *change.removed))
        for publication in self._publications:
            publication.note(change)

    def note_corrupt(self, block_hash: BlockHash) -> None:
        """Tell that a block's bytes are wrong, wherever it is."""
        for publication in self._publications:
            publication.note_corrupt(block_hash)

    async def run(self) -> None:
        """Do what publications have to do in the background, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for publication in self._publications:
                tasks.create_task(publication.run())

    async def close(self) -> None:
        """Say that this worker leaves; after `run` was cancelled."""
        for publication in self._publications:
            await publication.close()


def publications(config: WorkerConfig, epoch: str, fingerprint: str, clock: Clock) -> tuple[Publication, ...]:
    """Return where a worker's settings say that it tells of its cache.

    Args:
        config: Of the worker.
        epoch: Lifetime of its process.
        fingerprint: Digest of its model.
        clock: Paces and stamps what is told.

    Raises:
        ConfigError: an address cannot be used.
    """
    chosen: list[Publication] = []
    if config.redis.url is not None:
        log, redis = open_log(config.redis, config.index)
        life = Lifetime(location=config.name, epoch=epoch, started_unix_ms=clock.unix_ms())
        chosen.append(IndexPublication(IndexPublisher(log, life, clock), redis))
    if config.vllm_events.endpoint:
        context = zmq.asyncio.Context()
        chosen.append(
            VllmPublication(VllmPublisher(config.vllm_events, root_hash(fingerprint), context, clock), context)
        )
    return tuple(chosen)


def _changes(change: CacheChange) -> Iterable[Change]:
    decoded = set(change.decoded)
    groups = (
        (ChangeKind.REMOVED, EXACT, change.removed),
        (ChangeKind.STORED, EXACT, tuple(block for block in change.stored if block not in decoded)),
        (ChangeKind.STORED, DECODED, change.decoded),
    )
    return [
        Change(kind=kind, tier=Tier.DEVICE, origin=origin, hashes=hashes) for kind, origin, hashes in groups if hashes
    ]
