"""Follows a vLLM engine's KV events, so that the index can know what it holds."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from headrace.errors import ConfigError, InvalidRequest
from headrace.index.events import Change, Event
from headrace.index.vllm_blocks import ForeignBlocks
from headrace.index.vllm_events import (
    END_OF_REPLAY,
    SEQUENCE_BYTES,
    AllBlocksCleared,
    BlockStored,
    decode_batch,
)

HEARTBEAT_MS = 5_000
"""An engine that answers none for as long is taken for gone."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Before an engine that is away is tried again."""
_CONNECTION_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class ResetReason(Enum):
    """Why all blocks of an engine were forgotten."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    """The engine may be gone, and another may come back under its name."""
    RESTARTED = "restarted"
    """It counts from the start again."""
    GAP = "gap"
    """Batches were lost, and it no longer has them."""
    CLEARED = "cleared"
    """It said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSubscriberConfig:
    """Which engine is followed, and within which bounds.

    Attributes:
        endpoint: Its PUB socket.
        replay_endpoint: Its ROUTER socket; empty for none: then every gap forgets all.
        topic: First bytes of the topics to hear.
        replay_deadline_s: Longest that one replay may take.
        max_message_bytes: Longest message; one that is longer ends the connection.
        high_water_mark: Messages that wait here before some are lost.
    """

    endpoint: str
    replay_endpoint: str = ""
    topic: str = ""
    replay_deadline_s: float = 10.0
    max_message_bytes: int = 4 << 20
    high_water_mark: int = 16_384


@dataclass(slots=True, kw_only=True)
class VllmCounts:
    """What was seen of an engine.

    Attributes:
        num_batches: Batches taken, replayed ones among them.
        num_malformed: Messages and events that break the format.
        num_gaps: Times that live batches were missing.
        num_replayed: Batches taken from replays.
        resets: How often all blocks were forgotten, by reason.
    """

    num_batches: int = 0
    num_malformed: int = 0
    num_gaps: int = 0
    num_replayed: int = 0
    resets: Counter[ResetReason] = field(default_factory=Counter)


class VllmFeed:
    """Turns an engine's batches into events of its location; does no I/O.

    Each time all blocks are forgotten a new epoch begins, in which everything known of the old one is void.

    Attributes:
        expected: Sequence of the next batch; None until the first of an epoch says where counting stands.

    Args:
        location: Name of the engine in the index.
        blocks: Names its blocks.
        new_epoch: Makes names of epochs, each new.
        on_event: Hears of every change; must only take it in.
    """

    def __init__(
        self, location: str, blocks: ForeignBlocks, new_epoch: Callable[[], str], on_event: Callable[[Event], None]
    ) -> None:
        self._location = location
        self._blocks = blocks
        self._new_epoch = new_epoch
        self._on_event = on_event
        self._epoch = ""
        self._next_event = 0
        self.expected: int | None = None
        self.counts = VllmCounts()

    def reset(self, reason: ResetReason) -> None:
        """Forget all blocks and begin an epoch."""
        self.counts.resets[reason] += 1
        self.expected = None
        self._begin()

    def take(self, sequence: int, payload: bytes) -> None:
        """Apply a batch; one that cannot be read counts as empty."""
        self.expected = sequence + 1
        self.counts.num_batches += 1
        if not self._epoch:
            self._begin()
        try:
            batch = decode_batch(payload)
        except InvalidRequest:
            self.counts.num_malformed += 1
            return
        self.counts.num_malformed += batch.num_malformed
        changes: list[Change] = []
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self.counts.resets[ResetReason.CLEARED] += 1
                changes.clear()
                self._begin()
                continue
            change = self._blocks.store(event) if isinstance(event, BlockStored) else self._blocks.remove(event)
            if change is not None:
                changes.append(change)
        if changes:
            self._emit(tuple(changes))

    def _begin(self) -> None:
        self._blocks.clear()
        self._epoch, self._next_event = self._new_epoch(), 0
        self._emit(())

    def _emit(self, changes: tuple[Change, ...]) -> None:
        event = Event(location=self._location, epoch=self._epoch, sequence=self._next_event, changes=changes)
        self._next_event += 1
        self._on_event(event)


class VllmSubscriber:
    """Owns the sockets to one engine, and closes gaps in what it hears.

    Args:
        config: Which engine.
        feed: Takes the batches, in order.
        context: Of the process; outlives the subscriber.
    """

    def __init__(self, config: VllmSubscriberConfig, feed: VllmFeed, context: zmq.asyncio.Context) -> None:
        self._config = config
        self._feed = feed
        self._context = context
        self._last_heard: int | None = None

    async def run(self) -> None:
        """Follow the engine until cancelled, through its restarts and its absence.

        Raises:
            ConfigError: an endpoint cannot be used.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            # A socket for each connection: after a message that breaks the rules libzmq never connects again.
            was_met = await self._follow_once()
            pause_s = FIRST_PAUSE_S if was_met else min(LONGEST_PAUSE_S, 2 * pause_s)
            await asyncio.sleep(pause_s)

    async def _follow_once(self) -> bool:
        """Follow the engine until its connection ends; return whether there was one."""
        with self._context.socket(zmq.SUB) as sub:
            self._bound(sub)
            sub.subscribe(self._config.topic.encode())
            with sub.get_monitor_socket(_CONNECTION_EVENTS) as monitor:
                try:
                    _connect(sub, self._config.endpoint)
                    return await self._follow(sub, monitor)
                finally:
                    sub.disable_monitor()

    async def _follow(self, sub: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket) -> bool:
        poller = zmq.asyncio.Poller()
        poller.register(monitor, zmq.POLLIN)
        poller.register(sub, zmq.POLLIN)
        was_met = False
        while True:
            ready = dict(await poller.poll())
            if monitor in ready:
                if parse_monitor_message(await monitor.recv_multipart())["event"] == zmq.EVENT_DISCONNECTED:
                    self._begin_anew(ResetReason.DISCONNECTED)
                    return was_met
                was_met = True
                self._begin_anew(ResetReason.CONNECTED)
                await self._replay(0)
            else:
                await self._hear(await sub.recv_multipart())
            # A socket that is never empty would keep the loop to itself.
            await asyncio.sleep(0)

    def _begin_anew(self, reason: ResetReason) -> None:
        """Forget all: who answers now need not be who answered before, and may have missed the same numbers."""
        self._last_heard = None
        self._feed.reset(reason)

    async def _hear(self, frames: Sequence[bytes]) -> None:
        sequence = _sequence(frames)
        if sequence is None or sequence == END_OF_REPLAY:
            self._feed.counts.num_malformed += 1
            return
        if self._last_heard is not None and sequence <= self._last_heard:
            self._feed.reset(ResetReason.RESTARTED)
            await self._replay(0)
        self._last_heard = sequence
        expected = self._feed.expected
        if expected is not None and sequence > expected:
            self._feed.counts.num_gaps += 1
            await self._replay(expected)
        self._take(sequence, frames[2])

    def _take(self, sequence: int, payload: bytes) -> None:
        """Apply a batch that is next; one that comes after a hole voids what was known, an old one does nothing."""
        expected = self._feed.expected
        if expected is not None and sequence < expected:
            return
        if expected is not None and sequence > expected:
            self._feed.reset(ResetReason.GAP)
        self._feed.take(sequence, payload)

    async def _replay(self, start: int) -> None:
        """Take what the engine still has from batch `start` on, as far as it answers in time."""
        if not self._config.replay_endpoint:
            return
        # A socket for each replay: what comes too late for one must not be taken for an answer to the next.
        with self._context.socket(zmq.DEALER) as dealer:
            self._bound(dealer)
            _connect(dealer, self._config.replay_endpoint)
            try:
                async with asyncio.timeout(self._config.replay_deadline_s):
                    await dealer.send_multipart((b"", start.to_bytes(SEQUENCE_BYTES, "big")))
                    has_more = True
                    while has_more:
                        has_more = self._take_replayed(await dealer.recv_multipart())
                        await asyncio.sleep(0)
            except TimeoutError:
                return

    def _take_replayed(self, frames: Sequence[bytes]) -> bool:
        """Apply an answer; return whether more follow."""
        sequence = _sequence(frames)
        if sequence is None:
            self._feed.counts.num_malformed += 1
            return False
        if sequence == END_OF_REPLAY or not frames[2]:
            return False
        self._feed.counts.num_replayed += 1
        self._take(sequence, frames[2])
        return True

    def _bound(self, socket: zmq.asyncio.Socket) -> None:
        socket.linger = 0
        socket.rcvhwm = self._config.high_water_mark
        socket.maxmsgsize = self._config.max_message_bytes
        socket.heartbeat_ivl = HEARTBEAT_MS
        socket.reconnect_ivl, socket.reconnect_ivl_max = int(1000 * FIRST_PAUSE_S), int(1000 * LONGEST_PAUSE_S)


def _sequence(frames: Sequence[bytes]) -> int | None:
    """Return the number of a message of three frames, the middle one its sequence; None if it is none."""
    if len(frames) != 3 or len(frames[1]) != SEQUENCE_BYTES:
        return None
    return int.from_bytes(frames[1], "big")


def _connect(socket: zmq.asyncio.Socket, endpoint: str) -> None:
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(f"cannot follow KV events at {endpoint}: {error}", field="endpoint") from error
