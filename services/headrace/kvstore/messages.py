"""What is asked of the kvstore's actor."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from headrace.core.block import BlockHash, BlockId, KvLayout
from headrace.core.ledger import Holder
from headrace.kvstore.index import Report

ReplyT = TypeVar("ReplyT")
Reply: TypeAlias = "asyncio.Future[ReplyT]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """A lease on blocks; without blocks there is none and `lease_id` is empty.

    Attributes:
        indices: Which of the offered blocks to write; empty for reads.
    """

    lease_id: str = ""
    blocks: tuple[BlockId, ...] = ()
    deadline_unix_ms: int = 0
    indices: tuple[int, ...] = ()


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
    reply: "Reply[dict[str, int]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservePut:
    """Room for blocks, please."""

    hashes: Sequence[bytes]
    layout: KvLayout
    writer: str
    deadline_unix_ms: int
    reply: "Reply[Granted]"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitPut:
    """The writer has written, or gives up."""

    lease_id: str
    epoch: str
    is_complete: bool
    reply: "Reply[int]"


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquireGet:
    """Stored blocks to read, please."""

    hashes: Sequence[bytes]
    reader: str
    deadline_unix_ms: int
    reply: "Reply[Granted]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseGet:
    """The reader has read."""

    lease_id: str
    epoch: str
    reply: "Reply[None]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """A reader found other bytes than the block's digest says; answered by whether the block was here."""

    block_hash: BlockHash
    reply: "Reply[bool]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListHolders:
    """Who holds blocks?"""

    reply: "Reply[tuple[Holder, ...]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """A worker's own cache changed."""

    report: Report
    reply: "Reply[bool]"


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
class Tick:
    """Time went by."""


BlockMessage: TypeAlias = Match | ReservePut | CommitPut | AcquireGet | ReleaseGet | Quarantine | ListHolders
"""About blocks of the pool."""

Message: TypeAlias = BlockMessage | Meet | Announce | Forget | Prepare | CloseDoor | Tick
