"""Reading leases on the cached blocks of this worker, held by other processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.clock import Clock
from headrace.core.block import BlockId
from headrace.core.lease_terms import checked_hashes, lease_end_s
from headrace.errors import BlockLost, Saturated
from headrace.worker.engine import AsyncEngine

RETRY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBounds:
    """How much readers elsewhere may hold here.

    Attributes:
        max_open: Most leases at once.
        max_hashes: Most block hashes of one call.
        max_lease_s: Longest lease; a longer one asked for is cut.
        max_name_chars: Longest name of a reader or its lifetime that is kept; the rest is cut.
    """

    max_open: int = 64
    max_hashes: int = 65_536
    max_lease_s: float = 60.0
    max_name_chars: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Who asks.

    Attributes:
        name: Of its process.
        epoch: Lifetime of its process.
        tenant: For whom.
    """

    name: str
    epoch: str
    tenant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A lease; without blocks there is none and `lease_id` is empty."""

    lease_id: str = ""
    blocks: tuple[BlockId, ...] = ()
    deadline_unix_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Open:
    tenant: str
    deadline_s: float


class Reads:
    """Owner of all leases by which others read this worker's cache.

    The blocks stay in place by a pin in the engine's ledger that ends at the same time of the same clock as the
    lease, and before it only by `release`. So a lease that is known here and not over proves that its blocks
    were the reader's until now, and a release need not wait for the step that the engine is in.

    Args:
        engine: Owner of the blocks.
        clock: The engine's own; ends leases.
        epoch: Lifetime of this process; releases for another are fenced.
        new_id: Makes unguessable lease ids.
        bounds: How much readers may hold.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        clock: Clock,
        epoch: str,
        new_id: Callable[[], str],
        bounds: ReadBounds | None = None,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._epoch = epoch
        self._new_id = new_id
        self._bounds = bounds or ReadBounds()
        self._open: dict[str, _Open] = {}

    def num_open(self) -> int:
        """Return how many leases are held."""
        self._forget_ended()
        return len(self._open)

    async def acquire(self, hashes: Sequence[bytes], reader: Reader, deadline_unix_ms: int) -> Read:
        """Lease the longest cached prefix; waits for the end of the engine's step.

        Cancelling it leaves no lease.

        Raises:
            InvalidRequest: too many hashes, or some that are none.
            DeadlineExceeded: the lease would end before it began.
            Saturated: too many leases are held, or the engine's mailbox is full.
        """
        checked = checked_hashes(hashes, self._bounds.max_hashes)
        now_ms = self._clock.unix_ms()
        granted_s = lease_end_s((deadline_unix_ms - now_ms) / 1000, self._bounds.max_lease_s)
        if self.num_open() >= self._bounds.max_open:
            raise Saturated(
                f"{self._bounds.max_open} reads of this worker's blocks are open: take this as a miss",
                limit=str(self._bounds.max_open),
                retry_after_s=RETRY_S,
            )
        lease_id, deadline_s, size = self._new_id(), self._clock.now() + granted_s, self._bounds.max_name_chars
        self._open[lease_id] = _Open(tenant=reader.tenant, deadline_s=deadline_s)
        blocks: tuple[BlockId, ...] = ()
        try:
            blocks = await self._engine.pin(
                lease_id, checked, deadline_s, reader=reader.name[:size], epoch=reader.epoch[:size]
            )
        finally:
            if not blocks:
                self._open.pop(lease_id, None)
        if not blocks:
            return Read()
        return Read(lease_id=lease_id, blocks=blocks, deadline_unix_ms=now_ms + int(granted_s * 1000))

    def release(self, lease_id: str, epoch: str, tenant: str) -> None:
        """End a read. Success says that the blocks were the reader's all the time.

        Raises:
            BlockLost: the lease is unknown, another tenant's, of another epoch, or over: what was read may be of
                other blocks.
        """
        if epoch != self._epoch:
            raise BlockLost(f"this worker was restarted: lease of epoch {epoch}, this is {self._epoch}")
        self._forget_ended()
        lease = self._open.get(lease_id)
        if lease is None or lease.tenant != tenant:
            raise BlockLost("there is no such read, or it had ended by the clock: do not use what was read")
        del self._open[lease_id]
        self._engine.unpin(lease_id)

    def _forget_ended(self) -> None:
        now_s = self._clock.now()
        self._open = {name: lease for name, lease in self._open.items() if lease.deadline_s > now_s}
