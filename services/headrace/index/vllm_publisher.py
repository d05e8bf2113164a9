"""Tells routers that read vLLM's KV events (Dynamo's, llm-d's) what a location holds."""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import zmq
import zmq.asyncio

from headrace.clock import Clock
from headrace.core.block import BlockHash
from headrace.core.chained_block import ChainedBlock
from headrace.core.placement import Tier
from headrace.errors import ConfigError
from headrace.index.vllm_events import (
    END_OF_REPLAY,
    MEDIUMS,
    SEQUENCE_BYTES,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventForm,
    KvEvent,
    encode_batch,
)

REPLAY_STRIDE = 64
"""Messages of a replay between two turns of the loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmPublisherConfig:
    """Where and how events are published.

    Attributes:
        endpoint: Of the PUB socket, `tcp://*:5557`.
        replay_endpoint: Of the ROUTER socket; empty for no replay.
        connects: Whether the PUB socket connects to a reader that binds, as llm-d's central mode wants.
        topic: First frame; llm-d wants `kv@<pod>@<model>`.
        rank: Data-parallel rank.
        form: Layout of the events.
        has_int_hashes: Whether hashes are sent as their last 64 bits, as vLLM does by default, or whole.
        replay_batches: Batches kept for replay.
        replay_bytes: Most bytes of them.
        high_water_mark: Messages that wait for a slow reader before it loses some.
    """

    endpoint: str
    replay_endpoint: str = ""
    connects: bool = False
    topic: str = ""
    rank: int = 0
    form: EventForm = EventForm.ARRAY
    has_int_hashes: bool = True
    replay_batches: int = 10_000
    replay_bytes: int = 64 << 20
    high_water_mark: int = 10_000


class VllmPublisher:
    """Owns the sockets and the batches kept for replay. Nothing here waits for a reader.

    Only blocks under the public root are published: an event carries tokens, and other roots are tenants'.
    The first batch says that nothing is held, for readers that knew an earlier lifetime.

    Attributes:
        endpoint: What the PUB socket is bound or connected to.
        replay_endpoint: What the ROUTER socket is bound to; empty for none.

    Args:
        config: Where and how.
        public_root: Parent of the first blocks of public prefixes.
        context: Of the process; outlives the publisher.
        clock: Stamps batches.

    Raises:
        ConfigError: an endpoint cannot be used.
    """

    def __init__(
        self, config: VllmPublisherConfig, public_root: BlockHash, context: zmq.asyncio.Context, clock: Clock
    ) -> None:
        self._config = config
        self._public_root = public_root
        self._clock = clock
        self._topic = config.topic.encode()
        self._ring: deque[tuple[bytes, bytes]] = deque()
        self._ring_bytes = 0
        self._next_sequence = 0
        # Without asyncio: a PUB socket is always writable, it drops what a slow reader has no room for.
        self._pub = zmq.Context(context).socket(zmq.PUB)
        self._replay = context.socket(zmq.ROUTER)
        # A ROUTER drops what a reader has no room for: a whole replay and its end must fit.
        self._replay.sndhwm = config.replay_batches + 1
        self._pub.sndhwm = config.high_water_mark
        self._pub.linger = self._replay.linger = 0
        try:
            self._open()
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot publish KV events at {config.endpoint}: {error}", field="endpoint") from error
        self._send([AllBlocksCleared()])

    def _open(self) -> None:
        if self._config.connects:
            self._pub.connect(self._config.endpoint)
        else:
            self._pub.bind(self._config.endpoint)
        if self._config.replay_endpoint:
            self._replay.bind(self._config.replay_endpoint)
        self.endpoint = self._pub.get_string(zmq.LAST_ENDPOINT)
        self.replay_endpoint = self._replay.get_string(zmq.LAST_ENDPOINT)

    def publish(self, tier: Tier, *, stored: Sequence[ChainedBlock] = (), removed: Sequence[BlockHash] = ()) -> None:
        """Publish one change of a tier as one batch."""
        public = [block for block in stored if block.root == self._public_root]
        events: list[KvEvent] = [self._stored(run, tier) for run in _runs(public)]
        if removed:
            names = [self._name(block_hash) for block_hash in removed]
            events.append(BlockRemoved(block_hashes=names, medium=MEDIUMS[tier]))
        if events:
            self._send(events)

    async def run(self) -> None:
        """Answer requests for replay until cancelled; returns at once where no replay is offered."""
        while self._config.replay_endpoint:
            await self._answer(await self._replay.recv_multipart())

    def close(self) -> None:
        """Close the sockets; what readers have not received is lost."""
        self._pub.close()
        self._replay.close()

    async def _answer(self, frames: Sequence[bytes]) -> None:
        if len(frames) != 3 or len(frames[2]) != SEQUENCE_BYTES:
            return
        reader, _, start = frames
        for index, (sequence, payload) in enumerate(tuple(self._ring)):
            # Of one width and big-endian: bytes compare as the numbers do.
            if sequence >= start:
                await self._replay.send_multipart((reader, b"", sequence, payload))
            if index % REPLAY_STRIDE == 0:
                await asyncio.sleep(0)
        await self._replay.send_multipart((reader, b"", END_OF_REPLAY.to_bytes(SEQUENCE_BYTES, "big"), b""))

    def _send(self, events: Sequence[KvEvent]) -> None:
        payload = encode_batch(self._clock.unix_ms() / 1000, events, self._config.rank, self._config.form)
        sequence = self._next_sequence.to_bytes(SEQUENCE_BYTES, "big")
        self._next_sequence += 1
        self._ring.append((sequence, payload))
        self._ring_bytes += len(payload)
        while len(self._ring) > self._config.replay_batches or self._ring_bytes > self._config.replay_bytes:
            self._ring_bytes -= len(self._ring.popleft()[1])
        self._pub.send_multipart((self._topic, sequence, payload), flags=zmq.NOBLOCK)

    def _stored(self, run: Sequence[ChainedBlock], tier: Tier) -> BlockStored:
        first = run[0]
        return BlockStored(
            block_hashes=[self._name(block.block_hash) for block in run],
            parent_block_hash=None if first.parent == self._public_root else self._name(first.parent),
            token_ids=[token for block in run for token in block.tokens],
            block_size=len(first.tokens),
            medium=MEDIUMS[tier],
        )

    def _name(self, block_hash: BlockHash) -> int | bytes:
        return int.from_bytes(block_hash[-8:], "big") if self._config.has_int_hashes else bytes(block_hash)


def _runs(blocks: Sequence[ChainedBlock]) -> Iterator[Sequence[ChainedBlock]]:
    """Yield the blocks cut where one does not follow the one before it."""
    start = 0
    for index in range(1, len(blocks) + 1):
        if index == len(blocks) or blocks[index].parent != blocks[index - 1].block_hash:
            yield blocks[start:index]
            start = index
