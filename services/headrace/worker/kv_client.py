"""What a worker asks of the kvstore. The store is a cache: when it fails, that is a miss."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from headrace.clock import Clock
from headrace.core.block import BlockHash, BlockId, KvLayout
from headrace.core.step_back import StepBack
from headrace.core.wire import layout_to_proto
from headrace.errors import BlockLost, DeadlineExceeded, HeadraceError, NotReady, PeerFailed
from headrace.runtime.channels import Channels, translate_errors
from headrace.transfer.connector import Connector
from headrace.v1 import kvstore_pb2, kvstore_pb2_grpc, pool_pb2, pool_pb2_grpc
from headrace.worker.peers import Peers

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

CONTROL_TIMEOUT_S = 1.0
"""Longest wait for an answer: a request waits for it, and recomputing its prefix is never that slow to begin."""

RETRY_S = 1.0
"""After a failure the store is left alone for this long, so that no request waits for a dead one in turn."""

LONGEST_RETRY_S = 8.0
"""The pause doubles with every failure up to this; then one call asks for all."""

MAX_HASHES_PER_CALL = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCaller:
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


@dataclass(slots=True, kw_only=True)
class StoreCounts:
    """What went to and came from the store since the start."""

    num_fetched_blocks: int = 0
    num_stored_blocks: int = 0
    num_missed_fetches: int = 0
    num_failures: int = 0


@dataclass(slots=True, kw_only=True)
class _Announced:
    """What the index was told, so that a snapshot can be sent at any time."""

    hashes: dict[BlockHash, None] = field(default_factory=dict)
    sequence: int = 0
    owes_snapshot: bool = True


class KvClient:
    """One worker's dealings with the kvstore. Every wait has a limit.

    Args:
        address: host:port of the kvstore.
        channels: gRPC channels by address.
        connector: Moves blocks.
        peers: Connects the connector to the store's pool, and again after its restart.
        caller: Who asks.
        clock: Deadlines are on it.
    """

    def __init__(
        self,
        address: str,
        channels: Channels,
        connector: Connector,
        peers: Peers,
        caller: StoreCaller,
        clock: Clock,
    ) -> None:
        self._address = address
        self._channels = channels
        self._connector = connector
        self._peers = peers
        self._caller = caller
        self._clock = clock
        self._announced = _Announced()
        self._step_back = StepBack(clock, RETRY_S, LONGEST_RETRY_S)
        self.counts = StoreCounts()

    @property
    def owes_snapshot(self) -> bool:
        """Whether the index must be told again all that this worker holds."""
        return self._announced.owes_snapshot

    async def match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """Return how many leading blocks each location holds; nobody holds any when the store does not answer."""
        nobody: dict[str, int] = {}
        return await self._attempt("match", lambda: self._match(hashes), nobody)

    async def fetch(self, hashes: Sequence[BlockHash], local_ids: Sequence[BlockId], deadline_s: float) -> int:
        """Read the longest stored prefix into own blocks.

        Cancelling it leaves what was posted to its end; see `Connector.when_settled`.

        Args:
            hashes: Names of the blocks, in order.
            local_ids: Own blocks to fill.
            deadline_s: On the worker's clock.

        Returns:
            Leading blocks that have landed; 0 is a miss, whatever its cause.

        Raises:
            BlockLost: the read did not end in time and may still write into `local_ids`: the sequence must be
                started anew in other blocks.
        """
        num_landed = await self._attempt("fetch", lambda: self._fetch(hashes, local_ids, deadline_s), 0)
        if not num_landed:
            self.counts.num_missed_fetches += 1
            self._check_settled(local_ids)
        self.counts.num_fetched_blocks += num_landed
        return num_landed

    async def store(self, hashes: Sequence[BlockHash], local_ids: Sequence[BlockId], deadline_s: float) -> int:
        """Write own full blocks that the store does not have; those it has are not moved.

        Args:
            hashes: Names of the blocks, in order.
            local_ids: Own blocks that hold them; they must stay as they are until this returns.
            deadline_s: On the worker's clock.

        Returns:
            Blocks that became visible; 0 when the store failed or has them all.
        """
        num_stored = await self._attempt("store", lambda: self._store(hashes, local_ids, deadline_s), 0)
        self.counts.num_stored_blocks += num_stored
        return num_stored

    async def announce(self, stored: Sequence[BlockHash], removed: Sequence[BlockHash]) -> None:
        """Tell the index what changed in this worker's own cache; what it did not hear is told with the next call.

        Args:
            stored: Blocks that are there now and were not at the last call.
            removed: Blocks that were there and are not now.
        """
        told = self._announced
        for block_hash in removed:
            told.hashes.pop(block_hash, None)
        told.hashes.update(dict.fromkeys(stored))
        if told.owes_snapshot:
            await self._announce_all()
            return
        for stored_part, removed_part in _parts(stored, removed):
            if not await self._report(stored_part, removed_part, is_snapshot=False):
                return

    async def _announce_all(self) -> None:
        """Send a snapshot; one too large for a call goes on as ordinary reports."""
        self._announced.owes_snapshot = False
        is_first = True
        for stored_part, _ in _parts(tuple(self._announced.hashes), ()):
            if not await self._report(stored_part, (), is_snapshot=is_first):
                return
            is_first = False

    async def _report(self, stored: Sequence[BlockHash], removed: Sequence[BlockHash], *, is_snapshot: bool) -> bool:
        """Send one report; False when a snapshot is owed now."""
        told = self._announced
        request = kvstore_pb2.AnnounceBlocksRequest(
            worker=self._caller.name,
            epoch=self._caller.epoch,
            sequence=told.sequence,
            stored=stored,
            removed=removed,
            is_snapshot=is_snapshot,
        )
        # Counted before it is known to have arrived: the next one then shows a gap if it did not.
        told.sequence += 1
        told.owes_snapshot = await self._attempt("announce", lambda: self._send_report(request), True)  # noqa: FBT003
        return not told.owes_snapshot

    async def _send_report(self, request: kvstore_pb2.AnnounceBlocksRequest) -> bool:
        answer = await self._stub().AnnounceBlocks(request, timeout=CONTROL_TIMEOUT_S)
        return answer.needs_snapshot

    async def _match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        answer = await self._stub().Match(kvstore_pb2.MatchRequest(block_hashes=hashes), timeout=CONTROL_TIMEOUT_S)
        return {match.location: match.num_blocks for match in answer.matches}

    async def _fetch(self, hashes: Sequence[BlockHash], local_ids: Sequence[BlockId], deadline_s: float) -> int:
        await self._meet()
        request = pool_pb2.AcquireGetRequest(
            block_hashes=hashes,
            model_fingerprint=self._caller.fingerprint,
            reader=self._caller.name,
            reader_epoch=self._caller.epoch,
            deadline_unix_ms=self._unix_ms(deadline_s),
        )
        lease = (await self._pool_stub().AcquireGet(request, timeout=CONTROL_TIMEOUT_S)).lease
        num_blocks = len(lease.block_ids)
        if not num_blocks:
            return 0
        try:
            agent = await self._agent(lease.epoch)
            await self._connector.read(agent, local_ids[:num_blocks], lease.block_ids, deadline_s)
        except (HeadraceError, asyncio.CancelledError):
            await self._release(lease.lease_id, lease.epoch, is_wanted=False)
            raise
        await self._release(lease.lease_id, lease.epoch, is_wanted=True)
        return num_blocks

    async def _release(self, lease_id: str, epoch: str, *, is_wanted: bool) -> None:
        """End a read. Its success proves that the blocks were still the prefix when the data had landed.

        Args:
            lease_id: The lease.
            epoch: Of the store.
            is_wanted: Whether the data will be used, so that a refusal matters.
        """
        request = pool_pb2.ReleaseGetRequest(lease_id=lease_id, epoch=epoch)
        try:
            async with translate_errors(self._address):
                await self._pool_stub().ReleaseGet(request, timeout=CONTROL_TIMEOUT_S)
        except HeadraceError:
            if is_wanted:
                raise

    async def _store(self, hashes: Sequence[BlockHash], local_ids: Sequence[BlockId], deadline_s: float) -> int:
        await self._meet()
        request = kvstore_pb2.ReservePutRequest(
            block_hashes=hashes,
            layout=layout_to_proto(self._caller.layout),
            model_fingerprint=self._caller.fingerprint,
            writer=self._caller.name,
            writer_epoch=self._caller.epoch,
            deadline_unix_ms=self._unix_ms(deadline_s),
        )
        put = await self._stub().ReservePut(request, timeout=CONTROL_TIMEOUT_S)
        if not put.indices:
            return 0
        wanted = [local_ids[index] for index in put.indices]
        try:
            agent = await self._agent(put.lease.epoch)
            await self._connector.write(agent, wanted, put.lease.block_ids, deadline_s)
        except HeadraceError:
            # A revocation says that nothing is written any more. While something may be, the store's clock ends it.
            if self._is_settled(wanted):
                await self._commit(put.lease.lease_id, put.lease.epoch, is_complete=False)
            raise
        return await self._commit(put.lease.lease_id, put.lease.epoch, is_complete=True)

    async def _commit(self, lease_id: str, epoch: str, *, is_complete: bool) -> int:
        request = kvstore_pb2.CommitPutRequest(lease_id=lease_id, epoch=epoch, is_complete=is_complete)
        answer = await self._stub().CommitPut(request, timeout=CONTROL_TIMEOUT_S)
        return answer.num_committed

    async def _meet(self) -> None:
        """Connect to the store unless that is done; it opens its pool for the first worker it meets."""
        async with asyncio.timeout(CONTROL_TIMEOUT_S):
            await self._peers.ensure(self._address)

    async def _agent(self, epoch: str) -> str:
        """Return the transfer agent of the store that granted a lease; it may have restarted since it was met."""
        async with asyncio.timeout(CONTROL_TIMEOUT_S):
            peer = await self._peers.ensure(self._address, epoch)
        return peer.pool.agent_name

    async def _attempt(self, what: str, work: Callable[[], Awaitable[ResultT]], otherwise: ResultT) -> ResultT:
        """Turn every failure of the store into `otherwise`, logged and counted; leave a failed store alone a while."""
        if not self._step_back.may_ask():
            return otherwise
        try:
            async with translate_errors(self._address):
                result = await work()
        except (HeadraceError, TimeoutError) as error:
            self.counts.num_failures += 1
            code = error.code if isinstance(error, HeadraceError) else "timeout"
            logger.info("kvstore not used", extra={"what": what, "error": code})
            await self._note_failure(error)
            return otherwise
        self._step_back.note_answer()
        return result

    async def _note_failure(self, error: HeadraceError | TimeoutError) -> None:
        match error:
            case PeerFailed() | NotReady():
                # Dead, or reborn and without a pool: only a new handshake helps.
                self._announced.owes_snapshot = True
                self._step_back.note_failure()
                await self._peers.forget(self._address)
            case DeadlineExceeded() | TimeoutError():
                self._step_back.note_failure()
            case _:
                self._step_back.note_answer()

    def _stub(self) -> "kvstore_pb2_grpc.KvStoreServiceAsyncStub":
        return kvstore_pb2_grpc.KvStoreServiceStub(self._channels.get(self._address))

    def _pool_stub(self) -> "pool_pb2_grpc.PoolServiceAsyncStub":
        return pool_pb2_grpc.PoolServiceStub(self._channels.get(self._address))

    def _unix_ms(self, deadline_s: float) -> int:
        return self._clock.unix_ms() + int((deadline_s - self._clock.now()) * 1000)

    def _is_settled(self, local_ids: Sequence[BlockId]) -> bool:
        settled: list[bool] = []
        self._connector.when_settled(local_ids, lambda: settled.append(True))
        return bool(settled)

    def _check_settled(self, local_ids: Sequence[BlockId]) -> None:
        if not self._is_settled(local_ids):
            raise BlockLost("a read from the kvstore did not end in time and may still write into these blocks")


def _parts(
    stored: Sequence[BlockHash], removed: Sequence[BlockHash]
) -> Iterator[tuple[Sequence[BlockHash], Sequence[BlockHash]]]:
    """Cut a change into reports, at least one."""
    size = MAX_HASHES_PER_CALL
    for start in range(0, max(len(stored), len(removed), 1), size):
        yield stored[start : start + size], removed[start : start + size]
