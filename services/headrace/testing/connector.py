"""A transport inside one process, for tests without NIXL; it passes the same contract suite."""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.clock import Clock
from headrace.core.block import Span
from headrace.errors import DeadlineExceeded, HeadraceError, PeerFailed, PeerMismatch
from headrace.transfer.connector import PoolDescriptor, TransferStats, check_span
from headrace.transfer.quarantine import Quarantine

LOOK_S = 0.001


class Fabric:
    """What connects the fake connectors of one test, and what breaks them.

    Attributes:
        connectors: Live agents by name.
        moving: Set for agents whose transfers move.
    """

    def __init__(self) -> None:
        self.connectors: dict[str, FakeConnector] = {}
        self.moving: dict[str, asyncio.Event] = {}

    def join(self, connector: "FakeConnector") -> None:
        """Let peers find an agent."""
        self.connectors[connector.pool.agent_name] = connector
        self.moving[connector.pool.agent_name] = asyncio.Event()
        self.resume(connector.pool.agent_name)

    def stall(self, agent_name: str) -> None:
        """Stop an agent, as SIGSTOP stops its process: transfers with it do not move."""
        self.moving[agent_name].clear()

    def resume(self, agent_name: str) -> None:
        """Let a stalled agent go on."""
        self.moving[agent_name].set()

    def kill(self, agent_name: str) -> None:
        """End an agent at once, as SIGKILL ends its process."""
        self.connectors.pop(agent_name, None)
        self.resume(agent_name)


class FakeConnector:
    """Copies between numpy arrays; implements `transfer.connector.Connector`.

    Args:
        fabric: Where peers are found.
        agent_name: Unique in the fabric.
        blocks: The own pool, `[block, byte]`.
        epoch: Lifetime of the process it plays.
        clock: Deadlines are on it.
    """

    def __init__(self, fabric: Fabric, agent_name: str, blocks: NDArray[np.uint8], epoch: str, clock: Clock) -> None:
        self.blocks = blocks
        self._fabric = fabric
        self._clock = clock
        self._pool = PoolDescriptor(
            agent_name=agent_name,
            agent_metadata=f"fake:{agent_name}".encode(),
            base_address=blocks.ctypes.data,
            block_bytes=blocks.shape[1],
            num_blocks=blocks.shape[0],
            device_id=0,
            epoch=epoch,
        )
        self._peers: dict[str, PoolDescriptor] = {}
        self._quarantine = Quarantine()
        self._copies: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._stats = {"done": 0, "failed": 0, "written": 0, "read": 0}
        fabric.join(self)

    @property
    def pool(self) -> PoolDescriptor:
        """Describe the own pool."""
        return self._pool

    def stats(self) -> TransferStats:
        """Return the counters."""
        return TransferStats(
            num_inflight=self._quarantine.num_unsettled,
            num_done=self._stats["done"],
            num_failed=self._stats["failed"],
            written_bytes=self._stats["written"],
            read_bytes=self._stats["read"],
        )

    async def add_peer(self, pool: PoolDescriptor) -> None:
        """Connect to a peer of the same fabric."""
        if self._is_closed or pool.agent_metadata != f"fake:{pool.agent_name}".encode():
            raise PeerFailed(f"metadata of {pool.agent_name} are unusable")
        if pool.block_bytes != self._pool.block_bytes:
            raise PeerMismatch(f"blocks of {pool.agent_name} have {pool.block_bytes} bytes", field="block_bytes")
        self._peers[pool.agent_name] = pool

    async def remove_peer(self, agent_name: str) -> None:
        """Forget a peer; its transfers in flight raise PeerFailed."""
        self._peers.pop(agent_name, None)

    async def write(
        self, agent_name: str, local_ids: Sequence[int], remote_ids: Sequence[int], deadline_s: float
    ) -> None:
        """Copy own blocks into a peer's blocks."""

        def copy(peer: FakeConnector) -> None:
            peer.blocks[list(remote_ids)] = self.blocks[list(local_ids)]

        await self._move(copy, agent_name, (local_ids, remote_ids), deadline_s)
        self._stats["written"] += len(local_ids) * self._pool.block_bytes

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
        start, end = span or (0, self._pool.block_bytes)
        check_span(Span(start, end), self._pool.block_bytes)

        def copy(peer: FakeConnector) -> None:
            self.blocks[list(local_ids), start:end] = peer.blocks[list(remote_ids), start:end]

        await self._move(copy, agent_name, (local_ids, remote_ids), deadline_s, on_late)
        self._stats["read"] += len(local_ids) * (end - start)

    def when_settled(self, local_ids: Sequence[int], call: Callable[[], None]) -> None:
        """Call `call` once no transfer touches these own blocks."""
        self._quarantine.when_settled(local_ids, call)

    async def lane(self, agent_name: str) -> str:
        """Return "fake"."""
        self._peer(agent_name)
        return "fake"

    async def close(self) -> None:
        """Give up what is in flight."""
        self._is_closed = True
        self._peers.clear()
        self._fabric.connectors.pop(self._pool.agent_name, None)
        for copy in self._copies:
            copy.cancel()
        await asyncio.gather(*self._copies, return_exceptions=True)

    async def _move(
        self,
        copy: Callable[["FakeConnector"], None],
        agent_name: str,
        ids: tuple[Sequence[int], Sequence[int]],
        deadline_s: float,
        on_late: Callable[[], None] | None = None,
    ) -> None:
        self._check(agent_name, *ids)
        if not ids[0]:
            return
        token = self._quarantine.enter(ids[0])
        landed = asyncio.Event()
        # A task of its own: like the real thing, the data goes on moving when nobody waits any more.
        copying = asyncio.get_running_loop().create_task(self._copy(copy, agent_name, landed))
        self._copies.add(copying)
        copying.add_done_callback(self._copies.discard)
        copying.add_done_callback(lambda _: self._quarantine.leave(token))
        try:
            await self._wait(landed, copying, agent_name, deadline_s)
        except HeadraceError as error:
            self._stats["failed"] += 1
            if isinstance(error, DeadlineExceeded) and on_late is not None:
                copying.add_done_callback(lambda _: on_late() if landed.is_set() else None)
            raise
        self._stats["done"] += 1

    async def _copy(self, copy: Callable[["FakeConnector"], None], agent_name: str, landed: asyncio.Event) -> None:
        await asyncio.sleep(0)
        await self._fabric.moving[agent_name].wait()
        peer = self._fabric.connectors.get(agent_name)
        if peer is not None and self._fabric.connectors.get(self._pool.agent_name) is self:
            copy(peer)
            landed.set()

    async def _wait(
        self, landed: asyncio.Event, copying: "asyncio.Task[None]", agent_name: str, deadline_s: float
    ) -> None:
        while not landed.is_set():
            if self._is_closed or copying.done() or agent_name not in self._peers:
                raise PeerFailed(f"{agent_name} is gone")
            if self._clock.now() >= deadline_s:
                raise DeadlineExceeded(f"blocks to or from {agent_name} had not moved in time")
            await asyncio.wait([copying], timeout=LOOK_S)

    def _check(self, agent_name: str, local_ids: Sequence[int], remote_ids: Sequence[int]) -> None:
        if len(local_ids) != len(remote_ids):
            raise ValueError(f"{len(local_ids)} own blocks for {len(remote_ids)} of {agent_name}")
        if not all(0 <= block < self._pool.num_blocks for block in local_ids):
            raise ValueError(f"own block ids must be from 0 to {self._pool.num_blocks - 1}")
        num_blocks = self._peer(agent_name).num_blocks
        if not all(0 <= block < num_blocks for block in remote_ids):
            raise PeerFailed(f"{agent_name} named blocks outside its pool of {num_blocks}")

    def _peer(self, agent_name: str) -> PoolDescriptor:
        peer = self._peers.get(agent_name)
        if peer is None:
            raise PeerFailed(f"{agent_name} is not connected")
        return peer
