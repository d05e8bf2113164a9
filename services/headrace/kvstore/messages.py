"""What is asked of the kvstore's actor."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from headrace.core.block import BlockHash, BlockId, KvLayout
from headrace.core.holder import Holder
from headrace.core.put_facts import PutFacts
from headrace.index.prefix_index import PrefixMatch
from headrace.kvstore.disk import Written
from headrace.kvstore.store import Claim
from headrace.kvstore.stored_block import StoredBlock

ReplyT = TypeVar("ReplyT")
Reply: TypeAlias = "asyncio.Future[ReplyT]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Coming:
    """Blocks on their way from disk to memory.

    Attributes:
        ends: Each ends when some of them have come, or will not; they never fail.
    """

    ends: "tuple[asyncio.Future[None], ...]"
    hashes: frozenset[BlockHash]


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """A lease on blocks; without blocks there is none and `lease_id` is empty.

    Attributes:
        indices: Which of the offered blocks to write; empty for reads.
        num_refused: Offered blocks for which there was no room; 0 for reads.
        digests: Of each block; empty for writes.
        coming: What to wait for before asking again, if more of the prefix is being read from disk; then there is
            no lease yet.
    """

    lease_id: str = ""
    blocks: tuple[BlockId, ...] = ()
    deadline_unix_ms: int = 0
    indices: tuple[int, ...] = ()
    num_refused: int = 0
    digests: tuple[int, ...] = ()
    coming: "Coming | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Meet:
    """A process introduced itself; the first layout fixes the size of the blocks."""

    worker: str
    epoch: str
    layout: KvLayout | None
    reply: "Reply[None]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Who holds how much of a prefix?"""

    hashes: Sequence[bytes]
    reply: "Reply[tuple[PrefixMatch, ...]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservePut:
    """Room for blocks, please."""

    hashes: Sequence[bytes]
    layout: KvLayout
    writer: str
    writer_epoch: str = ""
    deadline_unix_ms: int
    facts: PutFacts = field(default_factory=PutFacts)
    reply: "Reply[Granted]"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitPut:
    """The writer has written, or gives up."""

    claim: Claim
    is_complete: bool
    digests: Sequence[int] = ()
    reply: "Reply[int]"


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquireGet:
    """Stored blocks to read, please.

    Attributes:
        may_promote: Whether blocks on disk are worth waiting for.
    """

    hashes: Sequence[bytes]
    reader: str
    reader_epoch: str = ""
    tenant: str = ""
    deadline_unix_ms: int
    may_promote: bool = False
    reply: "Reply[Granted]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseGet:
    """The reader has read."""

    claim: Claim
    reply: "Reply[None]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """A reader found other bytes than the block's digest says; answered by whether the block was here."""

    block_hash: bytes
    tenant: str
    reply: "Reply[bool]"


@dataclass(frozen=True, slots=True, kw_only=True)
class DropQuarantined:
    """Somebody else found these blocks to be wrong."""

    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListHolders:
    """Who holds blocks?"""

    reply: "Reply[tuple[Holder, ...]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """A worker's process is gone."""

    worker: str
    reply: "Reply[None]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """The canary needs a pool; answered by the layout of its blocks."""

    reply: "Reply[KvLayout]"


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseDoor:
    """Grant nothing any more; answered by the number of leases and writers left."""

    reply: "Reply[int]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListForHandover:
    """All blocks, those most worth keeping first."""

    reply: "Reply[tuple[StoredBlock, ...]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeForHandover:
    """Keep these blocks in memory until `hold_id` is let go; answered by those that are, or by what to wait for."""

    hold_id: str
    hashes: tuple[BlockHash, ...]
    may_promote: bool
    reply: "Reply[Taken]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """Blocks held, or what to wait for before asking again."""

    held: tuple[tuple[StoredBlock, BlockId], ...] = ()
    coming: Coming | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedOver:
    """A hold for a handover has ended; blocks that a sibling has are forgotten."""

    hold_id: str
    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskOpened:
    """The disk's blocks are known; None where it cannot be used."""

    survivors: tuple[StoredBlock, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskWrote:
    """A batch was written, or not."""

    holds: tuple[str, ...]
    blocks: tuple[StoredBlock, ...]
    outcomes: tuple[Written, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRead:
    """Blocks were read, or not.

    Attributes:
        landed: Those whose bytes are in memory.
        has_failed: Whether the disk refused.
    """

    lease_id: str
    blocks: tuple[StoredBlock, ...]
    landed: frozenset[BlockHash]
    has_failed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time went by."""


BlockMessage: TypeAlias = Match | ReservePut | CommitPut | AcquireGet | ReleaseGet | Quarantine | ListHolders
"""About blocks of the pool."""

DiskMessage: TypeAlias = DiskOpened | DiskWrote | DiskRead
"""From the disk."""

HandoverMessage: TypeAlias = ListForHandover | TakeForHandover | HandedOver
"""About leaving."""

Message: TypeAlias = (
    BlockMessage | DiskMessage | HandoverMessage | Meet | DropQuarantined | Forget | Prepare | CloseDoor | Tick
)
