"""The way to one process that owns a pool of blocks: who asks there, and what becomes of its failures."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from headrace.clock import Clock
from headrace.core.block import BlockId, KvLayout
from headrace.core.step_back import StepBack
from headrace.errors import DeadlineExceeded, Draining, HeadraceError, NotReady, PeerFailed
from headrace.runtime.channels import Channels, translate_errors
from headrace.transfer.connector import Connector
from headrace.v1 import kvstore_pb2_grpc, pool_pb2_grpc
from headrace.worker.peers import Peers

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

CONTROL_TIMEOUT_S = 1.0
"""Longest wait for an answer: a request waits for it, and recomputing its prefix is never that slow to begin."""

RETRY_S = 1.0
"""After a failure the process is left alone for this long, so that no request waits for a dead one in turn."""

HASTY_S = 0.1
"""Who gave up sooner has learnt that the process was slow, which meters of lanes count, and not that it failed."""

LONGEST_RETRY_S = 8.0
"""The pause doubles with every failure up to this; then one call asks for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCaller:
    """Who asks.

    Attributes:
        name: Of the worker.
        epoch: Lifetime of its process.
        fingerprint: Digest of its model.
        layout: Of its blocks.
    """

    name: str
    epoch: str
    fingerprint: str
    layout: KvLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkParts:
    """What all links of a process share.

    Attributes:
        channels: gRPC channels by address.
        connector: Moves blocks.
        peers: Connects the connector to other pools, and again after their restart.
        caller: Who asks.
        clock: Deadlines are on it.
    """

    channels: Channels
    connector: Connector
    peers: Peers
    caller: PoolCaller
    clock: Clock


class PoolLink:
    """Dealings with one address. Every wait has a limit; every failure is a miss.

    Args:
        address: host:port of the process.
        parts: What all links share.

    Attributes:
        num_failures: Calls that failed.
    """

    def __init__(self, address: str, parts: LinkParts) -> None:
        self.address = address
        self.parts = parts
        self.num_failures = 0
        self._step_back = StepBack(parts.clock, RETRY_S, LONGEST_RETRY_S)

    @property
    def is_resting(self) -> bool:
        """Whether the process failed lately and is left alone."""
        return self._step_back.is_resting

    async def attempt(self, what: str, work: Callable[[], Awaitable[ResultT]], otherwise: ResultT) -> ResultT:
        """Turn every failure into `otherwise`, logged and counted; leave a failed process alone a while."""
        if not self._step_back.may_ask():
            return otherwise
        begun_s = self.parts.clock.now()
        try:
            async with translate_errors(self.address):
                result = await work()
        except (HeadraceError, TimeoutError) as error:
            self.num_failures += 1
            code = error.code if isinstance(error, HeadraceError) else "timeout"
            logger.info("pool not used", extra={"what": what, "address": self.address, "error": code})
            await self._note_failure(error, self.parts.clock.now() - begun_s)
            return otherwise
        self._step_back.note_answer()
        return result

    async def meet(self) -> None:
        """Connect unless that is done; a kvstore opens its pool for the first worker it meets."""
        async with asyncio.timeout(CONTROL_TIMEOUT_S):
            await self.parts.peers.ensure(self.address)

    async def agent(self, epoch: str) -> str:
        """Return the transfer agent of the lifetime that granted a lease; it may be newer than the one met."""
        async with asyncio.timeout(CONTROL_TIMEOUT_S):
            peer = await self.parts.peers.ensure(self.address, epoch)
        return peer.pool.agent_name

    def pool_stub(self) -> "pool_pb2_grpc.PoolServiceAsyncStub":
        """Return the client of what every owner of a pool answers."""
        return pool_pb2_grpc.PoolServiceStub(self.parts.channels.get(self.address))

    def store_stub(self) -> "kvstore_pb2_grpc.KvStoreServiceAsyncStub":
        """Return the client of what kvstores alone answer."""
        return kvstore_pb2_grpc.KvStoreServiceStub(self.parts.channels.get(self.address))

    def unix_ms(self, deadline_s: float) -> int:
        """Return a time of the own clock as the wire has it."""
        clock = self.parts.clock
        return clock.unix_ms() + int((deadline_s - clock.now()) * 1000)

    def own_s(self, unix_ms: int) -> float:
        """Return a time of the wire on the own clock."""
        clock = self.parts.clock
        return clock.now() + (unix_ms - clock.unix_ms()) / 1000

    def is_settled(self, local_ids: Sequence[BlockId]) -> bool:
        """Return whether no transfer touches these own blocks."""
        settled: list[bool] = []
        self.parts.connector.when_settled(local_ids, lambda: settled.append(True))
        return bool(settled)

    async def _note_failure(self, error: HeadraceError | TimeoutError, waited_s: float) -> None:
        match error:
            case DeadlineExceeded() | TimeoutError() if waited_s < HASTY_S:
                pass
            case Draining() | DeadlineExceeded() | TimeoutError():
                self._step_back.note_failure()
            case PeerFailed() | NotReady():
                # Dead, or reborn and without a pool: only a new handshake helps.
                self._step_back.note_failure()
                await self.parts.peers.forget(self.address)
            case _:
                self._step_back.note_answer()
