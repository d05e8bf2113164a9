"""The one thread of a process that posts and polls transfers.

NIXL has no file descriptor to wait on, no deadline, and on one-sided lanes it copies inside the call that
posts. So an event loop never calls it: commands come in by a queue, ends go out by callbacks.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from headrace.clock import Clock
from headrace.core.block import Span
from headrace.errors import DeadlineExceeded, HeadraceError, InternalError, PeerFailed
from headrace.transfer.agent import BlockList, IdPairs, NixlAgent, Operation, Request
from headrace.transfer.connector import PoolDescriptor

logger = logging.getLogger(__name__)

POLL_S = 50e-6
"""Pause between looks at what is in flight: highest bandwidth and least loop lag of six ways tried (2026-11)."""

ABANDONED_POLL_S = 5e-3
"""Pause when only transfers are in flight that nobody waits for: a stalled peer may keep them for minutes."""

MAX_CHUNK_BYTES = 16 << 20
"""A post copies inside the call, 3 ms of it at 6 GB/s: longer ones would delay other transfers, shorter ones cost
bandwidth. Reading 45 MiB took 1.45 times as long as copying it with this, 1.55 with 4 MiB, 1.85 with 1 MiB (2-core
EPYC, 2026-11-22)."""

MAX_CHUNKS_IN_FLIGHT = 4
"""Of one transfer; on TCP one chunk at a time leaves the wire idle between two looks."""


class OnSettled(Protocol):
    """Hears that no data of a transfer moves any more."""

    def __call__(self, *, is_late: bool) -> None:
        """Hear it, and whether all of it has landed after its deadline."""
        ...


@dataclass(eq=False, slots=True, kw_only=True)
class Transfer:
    """One read or write: chunks to post, requests in flight, and one end.

    It is reported once, by `on_end`, and settles once, by `on_settled`; from then on no data of it moves.
    Both are called on the transfer thread, the end first.

    Attributes:
        chunks: Pairs (own block ids, the peer's block ids) still to post.
        span: The part of each block that moves; None moves all of it.
        in_flight: Requests posted and not settled.
        is_ended: Whether its end was reported; a transfer that ended and has requests in flight is abandoned.
        may_land_late: Whether its deadline was its end, with all of it in flight.
    """

    operation: Operation
    peer: str
    chunks: deque[IdPairs]
    deadline_s: float
    on_end: Callable[[HeadraceError | None], None]
    on_settled: OnSettled
    span: Span | None = None
    in_flight: list[Request] = field(default_factory=list)
    is_ended: bool = False
    may_land_late: bool = False

    def end(self, error: HeadraceError | None) -> None:
        """Report the end unless it was reported before; nothing more is posted."""
        if not self.is_ended:
            self.is_ended = True
            self.may_land_late = isinstance(error, DeadlineExceeded) and not self.chunks
            self.chunks.clear()
            self.on_end(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddPeer:
    """Connect to a pool."""

    pool: PoolDescriptor
    on_end: Callable[[HeadraceError | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovePeer:
    """Fail a peer's transfers and forget it."""

    agent_name: str
    on_end: Callable[[HeadraceError | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Fail all transfers and free the agent."""

    on_end: Callable[[HeadraceError | None], None]


Command: TypeAlias = Transfer | AddPeer | RemovePeer | Close


@dataclass(slots=True, kw_only=True)
class _Peer:
    pool: PoolDescriptor
    blocks: BlockList
    is_removed: bool = False
    is_broken: bool = False


class TransferThread:
    """Owns a NIXL agent after its construction: nobody else calls it.

    Args:
        agent: The agent.
        clock: Ends transfers.
    """

    def __init__(self, agent: NixlAgent, clock: Clock) -> None:
        self._agent = agent
        self._clock = clock
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._peers: dict[str, _Peer] = {}
        self._transfers: list[Transfer] = []
        self._is_closed = False
        # A daemon: a process that dies without closing must not wait for a stalled peer.
        self._thread = threading.Thread(target=self._run, name="transfer", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        """Queue a command; its callbacks are called on this thread."""
        self._commands.put(command)
        # Set before the thread drains the queue for the last time, so no command falls between the two.
        if self._is_closed:
            self._refuse_waiting()

    def join(self) -> None:
        """Wait for the end of the thread after a Close."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._is_closed:
                self._take_commands()
                if not self._advance() and any(not transfer.is_ended for transfer in self._transfers):
                    time.sleep(POLL_S)
        finally:
            for transfer in self._transfers:
                transfer.end(InternalError("the transfer thread failed"))
                transfer.on_settled(is_late=False)
            self._refuse_waiting()

    def _take_commands(self) -> None:
        """Handle all waiting commands; with nothing to poll, wait for one."""
        if not self._transfers:
            self._handle(self._commands.get())
        elif all(transfer.is_ended for transfer in self._transfers):
            try:
                self._handle(self._commands.get(timeout=ABANDONED_POLL_S))
            except queue.Empty:
                return
        while not self._is_closed:
            try:
                self._handle(self._commands.get_nowait())
            except queue.Empty:
                return

    def _handle(self, command: Command) -> None:
        match command:
            case Transfer():
                self._transfers.append(command)
            case AddPeer(pool=pool):
                command.on_end(self._try_add_peer(pool))
            case RemovePeer(agent_name=agent_name):
                self._remove_peer(agent_name)
                command.on_end(None)
            case Close():
                self._close()
                command.on_end(None)

    def _advance(self) -> bool:
        """Move every transfer one chunk further; return whether anything happened."""
        now_s = self._clock.now()
        has_moved = False
        for transfer in self._transfers:
            has_moved |= self._step(transfer, now_s)
        if any(not transfer.in_flight and transfer.is_ended for transfer in self._transfers):
            self._drop_settled()
        return has_moved

    def _step(self, transfer: Transfer, now_s: float) -> bool:
        has_moved = self._poll(transfer)
        peer = self._peers.get(transfer.peer)
        if transfer.is_ended:
            return has_moved
        if peer is None or peer.is_removed:
            transfer.end(PeerFailed(f"{transfer.peer} is not connected"))
        elif now_s >= transfer.deadline_s and (transfer.chunks or transfer.in_flight):
            transfer.end(DeadlineExceeded(f"blocks to or from {transfer.peer} had not moved in time"))
        elif transfer.chunks and len(transfer.in_flight) < MAX_CHUNKS_IN_FLIGHT:
            self._post(transfer, peer)
            has_moved = True
        if not transfer.chunks and not transfer.in_flight:
            transfer.end(None)
        return has_moved

    def _post(self, transfer: Transfer, peer: _Peer) -> None:
        chunk = transfer.chunks.popleft()
        try:
            if transfer.span is None:
                request = self._agent.make(transfer.operation, transfer.peer, peer.blocks, chunk)
            else:
                request = self._agent.make_part(transfer.operation, peer.pool, chunk, transfer.span)
        except PeerFailed as error:
            self._fail(transfer, error)
            return
        try:
            is_done = self._agent.post(request, transfer.peer)
        except PeerFailed as error:
            self._agent.release(request)
            self._fail(transfer, error)
            return
        if is_done:
            self._agent.release(request)
        else:
            transfer.in_flight.append(request)

    def _poll(self, transfer: Transfer) -> bool:
        """Look after requests in flight; one that failed has settled too: its connection is gone."""
        unsettled: list[Request] = []
        for request in transfer.in_flight:
            try:
                is_settled = self._agent.poll(request, transfer.peer)
            except PeerFailed as error:
                is_settled = True
                self._fail(transfer, error)
            if is_settled:
                self._agent.release(request)
            else:
                unsettled.append(request)
        has_moved = len(unsettled) < len(transfer.in_flight)
        transfer.in_flight = unsettled
        return has_moved

    def _fail(self, transfer: Transfer, error: HeadraceError) -> None:
        peer = self._peers.get(transfer.peer)
        if peer is not None:
            peer.is_broken = True
        transfer.end(error)
        transfer.may_land_late = False

    def _drop_settled(self) -> None:
        settled = [transfer for transfer in self._transfers if transfer.is_ended and not transfer.in_flight]
        self._transfers = [transfer for transfer in self._transfers if not transfer.is_ended or transfer.in_flight]
        for transfer in settled:
            transfer.on_settled(is_late=transfer.may_land_late)
            self._forget_if_quiet(transfer.peer)

    def _try_add_peer(self, pool: PoolDescriptor) -> HeadraceError | None:
        try:
            self._add_peer(pool)
        except HeadraceError as error:
            return error
        return None

    def _add_peer(self, pool: PoolDescriptor) -> None:
        known = self._peers.get(pool.agent_name)
        if known is not None:
            if known.pool == pool and not known.is_broken:
                known.is_removed = False
                return
            self._remove_peer(pool.agent_name)
            if pool.agent_name in self._peers:
                raise PeerFailed(f"{pool.agent_name} has unsettled transfers: a restarted process needs a new name")
        self._peers[pool.agent_name] = _Peer(pool=pool, blocks=self._agent.connect(pool))

    def _remove_peer(self, agent_name: str) -> None:
        peer = self._peers.get(agent_name)
        if peer is None:
            return
        peer.is_removed = True
        for transfer in self._transfers:
            if transfer.peer == agent_name:
                transfer.end(PeerFailed(f"{agent_name} was removed"))
        self._drop_settled()
        self._forget_if_quiet(agent_name)

    def _forget_if_quiet(self, agent_name: str) -> None:
        """Disconnect a removed peer once nothing is in flight.

        Data of a READ over TCP were seen to land after its release and after the peer was forgotten, so both
        wait until NIXL says that the request is done or broken.
        """
        peer = self._peers.get(agent_name)
        if peer is None or not peer.is_removed:
            return
        if all(transfer.peer != agent_name for transfer in self._transfers):
            del self._peers[agent_name]
            self._agent.disconnect(agent_name, peer.blocks)

    def _close(self) -> None:
        self._is_closed = True
        for transfer in self._transfers:
            transfer.end(PeerFailed("this process closed its transfer agent"))
            for request in transfer.in_flight:
                self._agent.release(request)
        for agent_name, peer in self._peers.items():
            self._agent.disconnect(agent_name, peer.blocks)
        self._peers.clear()
        self._agent.close()
        for transfer in self._transfers:
            transfer.on_settled(is_late=False)
        self._transfers.clear()

    def _refuse_waiting(self) -> None:
        """Answer commands that came too late."""
        self._is_closed = True
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if isinstance(command, Transfer):
                command.end(PeerFailed("this process has closed its transfer agent"))
                command.on_settled(is_late=False)
            elif isinstance(command, AddPeer):
                command.on_end(PeerFailed("this process has closed its transfer agent"))
            else:
                command.on_end(None)
