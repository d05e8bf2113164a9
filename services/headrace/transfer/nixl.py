"""Move blocks by NIXL over UCX: RDMA, NVLink, shared memory or TCP, whatever UCX finds."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence

from headrace.clock import Clock
from headrace.core.block import Span
from headrace.errors import HeadraceError, PeerFailed
from headrace.transfer.agent import IdPairs, NixlAgent, Operation, Transport
from headrace.transfer.arena import Arena
from headrace.transfer.connector import PoolDescriptor, TransferStats, check_span
from headrace.transfer.lane import probe_lane
from headrace.transfer.quarantine import Quarantine
from headrace.transfer.thread import MAX_CHUNK_BYTES, AddPeer, Close, RemovePeer, Transfer, TransferThread


class NixlConnector:
    """One NIXL agent per process for life; implements `transfer.connector.Connector`.

    Used from one event loop. A cancelled call leaves its transfer to run to its end; see `when_settled`.

    Args:
        transport: What the blocks travel by; closed with this object.
        arena: The own blocks; registered once, kept alive until `close`.
        epoch: Lifetime of this process.
        clock: Deadlines are on it.

    Raises:
        ConfigError: NIXL cannot register the arena.
    """

    def __init__(self, transport: Transport, arena: Arena, epoch: str, clock: Clock) -> None:
        agent = NixlAgent(transport, arena)
        self._arena = arena
        self._pool = PoolDescriptor(
            agent_name=transport.name,
            agent_metadata=agent.metadata,
            base_address=arena.base_address,
            block_bytes=arena.block_bytes,
            num_blocks=arena.num_blocks,
            device_id=0,
            epoch=epoch,
        )
        self._thread = TransferThread(agent, clock)
        self._quarantine = Quarantine()
        self._peers: dict[str, PoolDescriptor] = {}
        self._num_done = 0
        self._num_failed = 0
        self._bytes = {Operation.READ: 0, Operation.WRITE: 0}

    @property
    def pool(self) -> PoolDescriptor:
        """Describe the own pool for a handshake."""
        return self._pool

    def stats(self) -> TransferStats:
        """Return the counters; a transfer is in flight until it has settled."""
        return TransferStats(
            num_inflight=self._quarantine.num_unsettled,
            num_done=self._num_done,
            num_failed=self._num_failed,
            written_bytes=self._bytes[Operation.WRITE],
            read_bytes=self._bytes[Operation.READ],
        )

    async def add_peer(self, pool: PoolDescriptor) -> None:
        """Connect to a peer's pool; a pool of the same agent name is replaced."""
        ended, on_end = _reply()
        self._thread.send(AddPeer(pool=pool, on_end=on_end))
        _raise_if(await ended)
        self._peers[pool.agent_name] = pool

    async def remove_peer(self, agent_name: str) -> None:
        """Forget a peer; its transfers in flight raise PeerFailed."""
        self._peers.pop(agent_name, None)
        ended, on_end = _reply()
        self._thread.send(RemovePeer(agent_name=agent_name, on_end=on_end))
        _raise_if(await ended)

    async def write(
        self, agent_name: str, local_ids: Sequence[int], remote_ids: Sequence[int], deadline_s: float
    ) -> None:
        """Copy own blocks into a peer's blocks."""
        await self._move(Operation.WRITE, agent_name, (local_ids, remote_ids), deadline_s)

    async def read(
        self,
        agent_name: str,
        local_ids: Sequence[int],
        remote_ids: Sequence[int],
        deadline_s: float,
        span: Span | None = None,
        on_late: Callable[[], None] | None = None,
    ) -> None:
        """Copy a peer's blocks, or a part of each, into own blocks."""
        if span is not None:
            check_span(span, self._arena.block_bytes)
        await self._move(Operation.READ, agent_name, (local_ids, remote_ids), deadline_s, span, on_late)

    def when_settled(self, local_ids: Sequence[int], call: Callable[[], None]) -> None:
        """Call `call` on the event loop once no transfer touches these own blocks."""
        self._quarantine.when_settled(local_ids, call)

    async def lane(self, agent_name: str) -> str:
        """Return the transport that UCX chooses to a peer; costs a short-lived child process (1-2 s)."""
        return await probe_lane(self._peer(agent_name))

    async def close(self) -> None:
        """Give up what is in flight, disconnect and free the transport."""
        ended, on_end = _reply()
        self._thread.send(Close(on_end=on_end))
        await ended
        await asyncio.to_thread(self._thread.join)

    async def _move(  # noqa: PLR0913 what there is to say of a transfer
        self,
        operation: Operation,
        agent_name: str,
        ids: IdPairs,
        deadline_s: float,
        span: Span | None = None,
        on_late: Callable[[], None] | None = None,
    ) -> None:
        self._check(agent_name, *ids)
        if not ids[0]:
            return
        loop = asyncio.get_running_loop()
        num_bytes = self._arena.block_bytes if span is None else span.end - span.start
        ended, on_end = _reply()
        token = self._quarantine.enter(ids[0])

        def on_settled(*, is_late: bool) -> None:
            with contextlib.suppress(RuntimeError):  # The loop has closed: nobody is left to tell.
                if is_late and on_late is not None:
                    loop.call_soon_threadsafe(on_late)
                loop.call_soon_threadsafe(self._quarantine.leave, token)

        self._thread.send(
            Transfer(
                operation=operation,
                peer=agent_name,
                chunks=_chunks(ids, max(1, MAX_CHUNK_BYTES // num_bytes)),
                span=span,
                deadline_s=deadline_s,
                on_end=on_end,
                on_settled=on_settled,
            )
        )
        error = await ended
        if error is not None:
            self._num_failed += 1
            raise error
        self._num_done += 1
        self._bytes[operation] += len(ids[0]) * num_bytes

    def _check(self, agent_name: str, local_ids: Sequence[int], remote_ids: Sequence[int]) -> None:
        if len(local_ids) != len(remote_ids):
            raise ValueError(f"{len(local_ids)} own blocks for {len(remote_ids)} of {agent_name}")
        if local_ids and not 0 <= min(local_ids) <= max(local_ids) < self._arena.num_blocks:
            raise ValueError(f"own block ids must be from 0 to {self._arena.num_blocks - 1}")
        num_blocks = self._peer(agent_name).num_blocks
        if remote_ids and not 0 <= min(remote_ids) <= max(remote_ids) < num_blocks:
            raise PeerFailed(f"{agent_name} named blocks outside its pool of {num_blocks}")

    def _peer(self, agent_name: str) -> PoolDescriptor:
        peer = self._peers.get(agent_name)
        if peer is None:
            raise PeerFailed(f"{agent_name} is not connected")
        return peer


def _chunks(ids: IdPairs, size: int) -> deque[IdPairs]:
    local_ids, remote_ids = ids
    starts = range(0, len(local_ids), size)
    return deque((local_ids[start : start + size], remote_ids[start : start + size]) for start in starts)


def _reply() -> tuple["asyncio.Future[HeadraceError | None]", Callable[[HeadraceError | None], None]]:
    """Return a future of the running loop and what resolves it from another thread."""
    loop = asyncio.get_running_loop()
    reply: asyncio.Future[HeadraceError | None] = loop.create_future()

    def resolve(error: HeadraceError | None) -> None:
        if not reply.done():
            reply.set_result(error)

    def on_end(error: HeadraceError | None) -> None:
        with contextlib.suppress(RuntimeError):  # The loop has closed: nobody waits any more.
            loop.call_soon_threadsafe(resolve, error)

    return reply, on_end


def _raise_if(error: HeadraceError | None) -> None:
    if error is not None:
        raise error
