"""A vLLM engine as its documentation describes it: messages and sockets, re-created from docs/interop.md's sources."""

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from headrace.core.block import BlockHash
from headrace.index.vllm_events import EventForm

END = (-1).to_bytes(8, "big", signed=True)
"""Sequence of the message that ends a replay."""


def int_name(block_hash: bytes) -> int:
    """Return a hash as vLLM shortens it."""
    return int.from_bytes(block_hash[-8:], "big")


def documented_messages(form: EventForm) -> SimpleNamespace:
    """Return the message classes as documented, by place (until vLLM 0.22) or by name."""

    class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
        ts: float
        events: list[Any]
        data_parallel_rank: int | None = None

    class KVCacheEvent(msgspec.Struct, array_like=form is EventForm.ARRAY, omit_defaults=True, gc=False, tag=True):
        pass

    class BlockStored(KVCacheEvent):
        block_hashes: list[bytes | int]
        parent_block_hash: bytes | int | None
        token_ids: list[int]
        block_size: int
        lora_id: int | None
        medium: str | None
        lora_name: str | None
        extra_keys: list[tuple[Any, ...] | None] | None = None
        group_idx: int | None = None
        kv_cache_spec_kind: str | None = None
        kv_cache_spec_sliding_window: int | None = None
        locality: str | None = None

    class BlockRemoved(KVCacheEvent):
        block_hashes: list[bytes | int]
        medium: str | None
        group_idx: int | None = None
        locality: str | None = None

    class AllBlocksCleared(KVCacheEvent):
        pass

    class KVEventBatch(EventBatch):
        events: list[BlockStored | BlockRemoved | AllBlocksCleared]

    return SimpleNamespace(
        Batch=KVEventBatch, Stored=BlockStored, Removed=BlockRemoved, Cleared=AllBlocksCleared, form=form
    )


class DocumentedEngine:
    """A PUB socket that tells of changes, and a ROUTER socket that replays the last batches.

    Args:
        context: Of the sockets.
        messages: What `documented_messages` returns.
        address: Both sockets' addresses begin with it.
        kept: Batches kept for replay.

    Attributes:
        pub: It also says who subscribes.
        log: Batches that can be replayed.
        numbers: Yields the sequence of each batch.
    """

    def __init__(
        self, context: zmq.asyncio.Context, messages: SimpleNamespace, address: str, *, kept: int = 100
    ) -> None:
        self.messages, self.kept = messages, kept
        self.log: list[tuple[bytes, bytes]] = []
        self.numbers = itertools.count()
        # An XPUB socket is a PUB socket that also tells its owner who subscribes.
        self.pub, self.router = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
        # Of each that comes, though one that is just leaving wanted the same.
        self.pub.setsockopt(zmq.XPUB_VERBOSE, 1)
        self.pub.linger = self.router.linger = 0
        self.pub.bind(f"{address}-pub")
        self.router.bind(f"{address}-replay")

    async def publish(self, *events: object, is_lost: bool = False) -> None:
        """Publish one batch."""
        payload = msgspec.msgpack.encode(self.messages.Batch(ts=1.0, events=list(events), data_parallel_rank=0))
        await self.publish_bytes(payload, is_lost=is_lost)

    async def publish_bytes(self, payload: bytes, *, is_lost: bool = False) -> None:
        """Publish a payload; one that is lost is only replayed."""
        number = next(self.numbers).to_bytes(8, "big")
        self.log = [*self.log, (number, payload)][-self.kept :]
        if not is_lost:
            await self.pub.send_multipart([b"kv-events", number, payload])

    async def serve(self) -> None:
        """Answer requests for replay until cancelled."""
        while True:
            reader, empty, start = await self.router.recv_multipart()
            for number, payload in self.log:
                if number >= start:
                    await self.router.send_multipart([reader, empty, number, payload])
            await self.router.send_multipart([reader, empty, END, b""])

    def stored(
        self,
        hashes: Sequence[BlockHash],
        tokens: Sequence[int],
        places: range,
        name: Callable[[BlockHash], int | bytes] = int_name,
    ) -> object:
        """Return the event that some blocks of a chain came, under names made of our hashes.

        Args:
            hashes: Of the whole chain.
            tokens: Of the whole chain.
            places: Which of its blocks.
            name: Makes a name of a hash.
        """
        size = len(tokens) // len(hashes)
        parent = name(hashes[places.start - 1]) if places.start else None
        told = list(tokens[places.start * size : places.stop * size])
        names = [name(block_hash) for block_hash in hashes[places.start : places.stop]]
        return self.messages.Stored(names, parent, told, size, None, "GPU", None, [None])

    def close(self) -> None:
        """Close both sockets; what readers have not received is lost."""
        self.pub.close()
        self.router.close()
