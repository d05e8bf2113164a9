"""The contract every transport of KV blocks fulfils."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.core.block import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolDescriptor:
    """Registered memory that peers may read or write; travels in a handshake.

    Attributes:
        agent_name: Unique over processes and restarts.
        agent_metadata: Opaque connection blob of the transport.
        base_address: Address of block 0 in the owner's process.
        epoch: Lifetime of the owning process.
    """

    agent_name: str
    agent_metadata: bytes
    base_address: int
    block_bytes: int
    num_blocks: int
    device_id: int
    epoch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStats:
    """Counters of one connector since its start; `num_inflight` is now."""

    num_inflight: int = 0
    num_done: int = 0
    num_failed: int = 0
    written_bytes: int = 0
    read_bytes: int = 0


def check_span(span: Span, block_bytes: int) -> None:
    """Refuse a part that no block has.

    Raises:
        ValueError: it is empty or not inside a block.
    """
    if not 0 <= span.start < span.end <= block_bytes:
        raise ValueError(f"bytes {span.start} to {span.end} are no part of a block of {block_bytes}")


class Connector(Protocol):
    """One agent of a process: its pool is registered once, its peers are added and dropped.

    All coroutines may be called from the event loop; the copying happens elsewhere. A transfer
    moves whole blocks, `local_ids[i]` <-> `remote_ids[i]`, and has exactly one end: it returns
    when the data has landed, or raises. There is no partial success to rely on.

    The end of a call is not always the end of the data: after DeadlineExceeded, PeerFailed or the
    cancellation of the calling task, what was posted goes on moving. `when_settled` tells when
    it has stopped; until then own blocks must neither be reused nor believed.
    """

    @property
    def pool(self) -> PoolDescriptor:
        """Describe the own pool for a handshake."""
        ...

    def stats(self) -> TransferStats:
        """Return the counters."""
        ...

    async def add_peer(self, pool: PoolDescriptor) -> None:
        """Connect to a peer's pool; a pool of the same agent name is replaced.

        Raises:
            PeerFailed: the metadata is unusable or the peer cannot be reached.
        """
        ...

    async def remove_peer(self, agent_name: str) -> None:
        """Forget a peer; its transfers in flight raise PeerFailed. Unknown names are ignored.

        Removal aborts nothing: data of a stalled peer may still land, so blocks settle when the
        transport says so, not now.
        """
        ...

    async def write(
        self, agent_name: str, local_ids: Sequence[int], remote_ids: Sequence[int], deadline_s: float
    ) -> None:
        """Copy own blocks into a peer's blocks.

        Args:
            agent_name: The peer.
            local_ids: Own blocks.
            remote_ids: As many blocks of the peer.
            deadline_s: On the clock the connector was made with.

        Raises:
            PeerFailed: the peer is unknown, died or refused; nothing may be assumed of its blocks.
            DeadlineExceeded: the transfer had not settled in time. Its local blocks stay in use
                by the transport until `when_settled` says otherwise.
            ValueError: own ids are out of range, or the two sides differ in length.
        """
        ...

    async def read(
        self,
        agent_name: str,
        local_ids: Sequence[int],
        remote_ids: Sequence[int],
        deadline_s: float,
        span: Span | None = None,
        on_late: Callable[[], None] | None = None,
    ) -> None:
        """Copy a peer's blocks into own blocks; raises as `write`.

        Args:
            agent_name: The peer.
            local_ids: Own blocks.
            remote_ids: As many blocks of the peer.
            deadline_s: On the clock the connector was made with.
            span: The part of each block to copy; None copies all of it.
            on_late: Called on the event loop if, after DeadlineExceeded, all of it has landed nevertheless.

        Raises:
            ValueError: also if the span is empty or not inside a block.
        """
        ...

    def when_settled(self, local_ids: Sequence[int], call: Callable[[], None]) -> None:
        """Call `call` on the event loop once no transfer touches these own blocks; at once when none does.

        Transfers begun later are not waited for.
        """
        ...

    async def lane(self, agent_name: str) -> str:
        """Return how a peer's blocks reach this process, for example "cma" or "tcp"; reads its last block.

        Raises:
            PeerFailed: the peer is unknown or cannot be reached.
        """
        ...

    async def close(self) -> None:
        """Give up what is in flight, disconnect and free the transport; afterwards nothing lands."""
        ...
