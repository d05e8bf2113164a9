"""NIXL's bindings behind the few verbs that a connector needs."""

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from types import ModuleType
from typing import Any, NewType, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrace.core.block import Span
from headrace.errors import ConfigError, PeerFailed, PeerMismatch
from headrace.transfer.arena import Arena
from headrace.transfer.connector import PoolDescriptor

BlockList = NewType("BlockList", int)
"""All blocks of one pool, prepared once; requests name blocks by index."""

Request = NewType("Request", int)
"""One posted transfer."""

PROGRESS_DELAY_US = 100_000
"""Longest pause of NIXL's progress thread: data wakes it earlier, so a longer one costs no bandwidth and no latency.
The thread of an idle process takes 0.5 % of a core with 10,000, a tenth of that with 100,000; the default of 0 burns
a core (2 cores, 2026-11-21)."""

IdPairs: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""Own block ids and, of the same length, the peer's."""

_PACKAGES = ("nixl_cu12", "nixl_cu13")
_ERRORS = (
    "nixlBackendError",
    "nixlCancelledError",
    "nixlInvalidParamError",
    "nixlMismatchError",
    "nixlNotAllowedError",
    "nixlNotFoundError",
    "nixlNotPostedError",
    "nixlNotSupportedError",
    "nixlRemoteDisconnectError",
    "nixlRepostActiveError",
    "nixlUnknownError",
)


class Operation(Enum):
    """Direction of a transfer, seen from this process."""

    READ = "read"
    WRITE = "write"


class Transport:
    """NIXL's agent and its UCX back end, before any memory is registered.

    Opening takes half a second, in C and without the GIL: a process with more to do at its start does both at once.
    Talks to the bindings and not to the package's own wrapper class, which hard-codes the delay of the
    progress thread to 0.

    Args:
        name: Unique over processes and restarts.
        is_passive: Whether peers may begin transfers. It costs a thread that wakes ten times a second; an agent
            without it drives only the transfers that it began itself, when they are polled.

    Attributes:
        handle: The agent of the bindings.
        bindings: NIXL's.
        errors: What they raise.

    Raises:
        ConfigError: NIXL is not installed, or finds no transport that it can use.
    """

    def __init__(self, name: str, *, is_passive: bool = True) -> None:
        self.name = name
        self.bindings = load_bindings()
        self.errors: tuple[type[Exception], ...] = tuple(getattr(self.bindings, kind) for kind in _ERRORS)
        config = self.bindings.nixlAgentConfig()
        config.useProgThread = is_passive
        config.pthrDelay = PROGRESS_DELAY_US
        config.useListenThread = False
        config.syncMode = self.bindings.NIXL_THREAD_SYNC_STRICT
        with self.refused():
            self.handle: Any = self.bindings.nixlAgent(name, config)
            self.handle.createBackend("UCX", {})

    @contextmanager
    def refused(self) -> Iterator[None]:
        """Say of any error of NIXL that there is no transport."""
        try:
            yield
        except self.errors as error:
            raise ConfigError(f"NIXL finds no transport: {error}; keep tcp in UCX_TLS if it is set") from None


class NixlAgent:
    """One NIXL agent with one registered arena. Its verbs may block for as long as a copy takes.

    Args:
        transport: The agent; belongs to this object from now on.
        arena: Registered for as long as the agent lives.

    Raises:
        ConfigError: NIXL cannot register the arena.
    """

    def __init__(self, transport: Transport, arena: Arena) -> None:
        self._nixl, self._errors = transport.bindings, transport.errors
        self._transport = transport
        self._agent = transport.handle
        self._arena = arena
        with transport.refused():
            self._registered = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, _rows(arena.base_address, arena.num_bytes))
            self._agent.registerMem(self._registered, [])
        self.own_blocks = self._prepare(self._nixl.NIXL_INIT_AGENT, _blocks(arena))
        self.metadata: bytes = self._agent.getLocalMD()

    def connect(self, pool: PoolDescriptor) -> BlockList:
        """Load a peer and prepare its blocks.

        Raises:
            PeerFailed: its metadata are unusable or it cannot be reached.
            PeerMismatch: its metadata are somebody else's, or its blocks have another size.
        """
        if pool.block_bytes != self._arena.block_bytes:
            raise PeerMismatch(
                f"blocks of {pool.agent_name} have {pool.block_bytes} bytes, ours {self._arena.block_bytes}",
                field="block_bytes",
            )
        with self._translate(pool.agent_name):
            found = self._agent.loadRemoteMD(pool.agent_metadata)
            name = found.decode() if isinstance(found, bytes) else str(found)
            if name != pool.agent_name:
                self._agent.invalidateRemoteMD(name)
                raise PeerMismatch(f"metadata of {pool.agent_name} belong to {name}", field="agent_metadata")
            self._agent.makeConnection(name, [])
            return self._prepare(name, _blocks(pool))

    def disconnect(self, agent_name: str, blocks: BlockList) -> None:
        """Forget a peer that has nothing in flight; one that is already gone is no error."""
        for forget, what in ((self._agent.releasedDlistH, blocks), (self._agent.invalidateRemoteMD, agent_name)):
            try:
                forget(what)
            except self._errors as error:
                logging.getLogger(__name__).info(
                    "peer was gone already", extra={"peer": agent_name, "error": type(error).__name__}
                )

    def make(self, operation: Operation, peer: str, remote: BlockList, ids: IdPairs) -> Request:
        """Prepare a transfer between `ids[0]` of the own blocks and `ids[1]` of the peer's.

        Raises:
            PeerFailed: the peer is not connected any more.
        """
        code = self._nixl.NIXL_READ if operation is Operation.READ else self._nixl.NIXL_WRITE
        local_ids, remote_ids = (np.asarray(side, dtype=np.int32) for side in ids)
        with self._translate(peer):
            return Request(
                self._agent.makeXferReq(code, self.own_blocks, local_ids, remote, remote_ids, b"", [], False)
            )

    def make_part(self, operation: Operation, peer: PoolDescriptor, ids: IdPairs, span: Span) -> Request:
        """Prepare a transfer of a part of each block; as `make`, at the cost of a look-up for each block."""
        code = self._nixl.NIXL_READ if operation is Operation.READ else self._nixl.NIXL_WRITE
        local = self._nixl.nixlXferDList(self._nixl.DRAM_SEG, _parts(self._arena, ids[0], span))
        remote = self._nixl.nixlXferDList(self._nixl.DRAM_SEG, _parts(peer, ids[1], span))
        with self._translate(peer.agent_name):
            return Request(self._agent.createXferReq(code, local, remote, peer.agent_name))

    def post(self, request: Request, peer: str) -> bool:
        """Start a transfer; where the lane is one-sided memory access it is done when this returns.

        Raises:
            PeerFailed: the peer is gone.
        """
        with self._translate(peer):
            return self._is_done(self._agent.postXferReq(request, b""), peer)

    def poll(self, request: Request, peer: str) -> bool:
        """Return whether a posted transfer is done; raises as `post`."""
        with self._translate(peer):
            return self._is_done(self._agent.getXferStatus(request), peer)

    def release(self, request: Request) -> None:
        """Let a settled request go. An unfinished one is given up, but its data may still land."""
        try:
            self._agent.releaseXferReq(request)
        except self._errors as error:
            logging.getLogger(__name__).info("request not released", extra={"error": type(error).__name__})

    def close(self) -> None:
        """Free the transport: nothing lands after this, for nobody drives it any more."""
        self._agent.deregisterMem(self._registered, [])
        self._agent = self._transport.handle = None

    def _prepare(self, owner: str, rows: NDArray[np.uint64]) -> BlockList:
        return BlockList(self._agent.prepXferDlist(owner, self._nixl.nixlXferDList(self._nixl.DRAM_SEG, rows), []))

    def _is_done(self, status: object, peer: str) -> bool:
        if status == self._nixl.NIXL_SUCCESS:
            return True
        if status == self._nixl.NIXL_IN_PROG:
            return False
        raise PeerFailed(f"transfer with {peer} failed: {status}")

    @contextmanager
    def _translate(self, peer: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise PeerFailed(f"transfer with {peer} failed: {type(error).__name__}") from None


def load_bindings() -> ModuleType:
    """Import NIXL's bindings, for CUDA 12 or else 13, and quiet their package.

    Raises:
        ConfigError: neither is installed.
    """
    raises = logging.raiseExceptions
    for package in _PACKAGES:
        try:
            bindings = importlib.import_module(f"{package}._bindings")
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            continue
        # The package configures logging at import: INFO to stdout, and logging errors are swallowed process-wide.
        nixl_logger = logging.getLogger("nixl")
        nixl_logger.handlers.clear()
        nixl_logger.propagate = True
        nixl_logger.setLevel(logging.WARNING)
        logging.raiseExceptions = raises
        return bindings
    raise ConfigError("KV transfer needs NIXL: install nixl-cu12 (or nixl-cu13)")


def _blocks(pool: Arena | PoolDescriptor) -> NDArray[np.uint64]:
    return _parts(pool, range(pool.num_blocks), Span(0, pool.block_bytes))


def _parts(pool: Arena | PoolDescriptor, block_ids: Sequence[int], span: Span) -> NDArray[np.uint64]:
    rows = np.empty((len(block_ids), 3), dtype=np.uint64)
    rows[:, 0] = pool.base_address + span.start + np.asarray(block_ids, dtype=np.uint64) * pool.block_bytes
    rows[:, 1] = span.end - span.start
    rows[:, 2] = 0
    return rows


def _rows(address: int, num_bytes: int) -> NDArray[np.uint64]:
    return np.array([[address, num_bytes, 0]], dtype=np.uint64)
