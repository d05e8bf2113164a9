"""Makes engines that publish vLLM's KV events locations of the index, whoever may read from them."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine
from typing import Any

import zmq
import zmq.asyncio

from headrace.clock import Clock
from headrace.core.block import root_hash
from headrace.errors import ConfigError
from headrace.index.config import FollowedEngine, VllmFeedsConfig
from headrace.index.events import Event
from headrace.index.log import IndexLog, Lifetime
from headrace.index.publisher import INTERVAL_S, IndexPublisher
from headrace.index.vllm_blocks import ForeignBlocks
from headrace.index.vllm_subscriber import ResetReason, VllmFeed, VllmSubscriber, VllmSubscriberConfig

RETRY_S = 5.0
"""Before an engine whose socket failed is tried again, and how often somebody who stands by looks."""

_log = logging.getLogger(__name__)


class ForeignLocation:
    """Publishes what is known of one engine; each epoch of its feed is a lifetime of the location.

    Args:
        name: In the index.
        log: Where to.
        clock: Paces it.
    """

    def __init__(self, name: str, log: IndexLog, clock: Clock) -> None:
        self._name = name
        self._log = log
        self._clock = clock
        self._started_unix_ms = 0
        self._is_replaced = asyncio.Event()
        self._publisher = self._begin(secrets.token_hex(8))

    @property
    def num_blocks(self) -> int:
        """Blocks published or about to be, one per tier."""
        return self._publisher.num_blocks

    def note(self, event: Event) -> None:
        """Publish an event soon; one that begins an epoch voids what was known, published or not."""
        if event.sequence == 0:
            self._publisher = self._begin(event.epoch)
            self._is_replaced.set()
        self._publisher.note(event.changes)

    async def run(self) -> None:
        """Publish until cancelled, or until another process that follows the engine takes over."""
        while not self._publisher.is_fenced:
            self._is_replaced.clear()
            await _first_of(self._publisher.run(), self._is_replaced.wait())
            # An engine may begin as many epochs as it likes: the log is told of some.
            await asyncio.sleep(INTERVAL_S)

    async def leave(self) -> None:
        """Take the engine out of the index; after `run` was cancelled."""
        await self._publisher.leave()

    def _begin(self, epoch: str) -> IndexPublisher:
        # The log keeps the lifetime that started later, and two may begin within one tick of the clock.
        self._started_unix_ms = max(self._started_unix_ms + 1, self._clock.unix_ms())
        life = Lifetime(location=self._name, epoch=epoch, started_unix_ms=self._started_unix_ms)
        return IndexPublisher(self._log, life, self._clock)


class VllmFeeds:
    """Follows all engines that the settings name.

    Of several processes that follow one engine the one that began last publishes; the others stand by until the
    location is gone.

    Args:
        config: Which engines.
        log: Where they are published.
        clock: Paces publishing.
        is_known: Returns whether a location is in the index.
    """

    def __init__(self, config: VllmFeedsConfig, log: IndexLog, clock: Clock, is_known: Callable[[str], bool]) -> None:
        self._config = config
        self._log = log
        self._clock = clock
        self._is_known = is_known
        self._model: tuple[str, int] | None = None
        self._is_met = asyncio.Event()
        self._locations: list[ForeignLocation] = []

    @property
    def num_followed(self) -> int:
        """Engines of which this process tells the index."""
        return len(self._locations)

    def meet(self, fingerprint: str, block_tokens: int) -> None:
        """Learn from a worker's handshake under which names the cluster knows blocks; the first that fits counts.

        Args:
            fingerprint: Of the worker's model.
            block_tokens: Tokens of its blocks.
        """
        if self._model is not None or not self._config.engines or not fingerprint:
            return
        if self._config.fingerprint not in ("", fingerprint):
            _log.warning("vllm_feeds_other_model", extra={"wanted": self._config.fingerprint, "found": fingerprint})
            return
        self._model = fingerprint, block_tokens
        self._is_met.set()

    async def run(self) -> None:
        """Follow until cancelled, whatever the engines send or do."""
        if not self._config.engines:
            return
        with zmq.asyncio.Context() as context:
            async with asyncio.TaskGroup() as tasks:
                for engine in self._config.followed():
                    tasks.create_task(self._follow(engine, context))

    async def close(self) -> None:
        """Take the engines out of the index; after `run` was cancelled."""
        for location in self._locations:
            await location.leave()

    async def _follow(self, engine: FollowedEngine, context: zmq.asyncio.Context) -> None:
        while True:
            location = ForeignLocation(engine.location, self._log, self._clock)
            self._locations.append(location)
            # Without a model too: what an earlier process said of the engine is void.
            await _first_of(location.run(), self._hear(engine, location, context))
            self._locations.remove(location)
            _log.info("vllm_feed_stands_by", extra={"location": engine.location})
            await asyncio.sleep(RETRY_S)
            while self._is_known(engine.location):  # noqa: ASYNC110 the index tells nobody of a change
                await asyncio.sleep(RETRY_S)

    async def _hear(self, engine: FollowedEngine, location: ForeignLocation, context: zmq.asyncio.Context) -> None:
        await self._is_met.wait()
        assert self._model is not None
        fingerprint, block_tokens = self._model
        blocks = ForeignBlocks(root_hash(fingerprint), block_tokens, self._config.max_blocks)
        feed = VllmFeed(engine.location, blocks, lambda: secrets.token_hex(8), location.note)
        while True:
            try:
                await VllmSubscriber(self._subscription(engine), feed, context).run()
            except (ConfigError, zmq.ZMQError, OSError) as error:
                _log.warning("vllm_feed_failed", extra={"location": engine.location, "problem": str(error)})
            except Exception:  # noqa: BLE001 what an engine sends must not end the process that listens
                _log.exception("vllm_feed_failed", extra={"location": engine.location})
            # Nobody watches it now: what was known may be wrong soon.
            feed.reset(ResetReason.DISCONNECTED)
            await asyncio.sleep(RETRY_S)

    def _subscription(self, engine: FollowedEngine) -> VllmSubscriberConfig:
        return VllmSubscriberConfig(
            endpoint=engine.endpoint,
            replay_endpoint=engine.replay_endpoint,
            topic=self._config.topic,
            replay_deadline_s=self._config.replay_deadline_s,
            max_message_bytes=self._config.max_message_bytes,
            high_water_mark=self._config.max_waiting,
        )


async def _first_of(*work: Coroutine[Any, Any, object]) -> None:
    """Run coroutines until one has ended, and end the others."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
