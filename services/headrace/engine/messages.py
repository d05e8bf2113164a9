"""What crosses between the event loop and the engine's thread."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from headrace.core.block import BlockHash, BlockId
from headrace.core.chained_block import ChainedBlock
from headrace.core.holder import Holder
from headrace.core.request import Revision, SequenceId, SequenceSpec, Token
from headrace.engine.landing import Landing
from headrace.errors import HeadraceError


class Goal(Enum):
    """How far an engine takes a sequence."""

    FIRST_TOKEN = "first_token"
    """Compute all known tokens, sample one token, then keep the blocks until `close`."""
    ANSWER = "answer"
    """Generate until a finish reason, then let the blocks go to the prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The sequence has blocks for all its known tokens; the engine waits for `begin`.

    Attributes:
        block_ids: Its block table, one entry per block of known tokens.
        num_cached_tokens: Leading tokens whose KV the local prefix cache provided; a
            multiple of the block size and less than the number of known tokens.
        block_hashes: Chained hashes of the full blocks of the known tokens.
        version: Of the prompt that it was admitted with.
        num_tokens: Known tokens of that.
    """

    sequence_id: SequenceId
    block_ids: tuple[BlockId, ...]
    num_cached_tokens: int
    block_hashes: tuple[BlockHash, ...]
    num_tokens: int
    version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """KV of tokens [0, num_computed) is present: a chunk was computed, or no more is known of an open prompt.

    Not sent while a sequence decodes.

    Attributes:
        version: Of the prompt that this is true of.
        block_ids: Blocks of the computed tokens, of a sequence that was opened open; else those of its admission.
    """

    sequence_id: SequenceId
    num_computed: int
    version: int = 0
    block_ids: tuple[BlockId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Extended:
    """A held open sequence, whose KV a peer sends, has blocks for all tokens of its prompt's new version.

    Attributes:
        block_ids: Its whole table, one entry per block of known tokens; the first ones are those it had.
    """

    sequence_id: SequenceId
    version: int
    block_ids: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A token was chosen; the last one carries its finish reason."""

    sequence_id: SequenceId
    token: Token


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The sequence ended without finishing.

    Blocks of a sequence that waits for Begin, or whose goal is the first token, are released at Close:
    until then a transfer may use them, or be about to announce itself.
    """

    sequence_id: SequenceId
    error: HeadraceError


EngineEvent: TypeAlias = Admitted | Progress | Extended | Sampled | Failed
EventSink: TypeAlias = Callable[[EngineEvent], None]
"""Called on the engine's thread; must only hand the event over (`call_soon_threadsafe`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Ask for blocks for all known tokens of a sequence; answered by Admitted or Failed.

    Attributes:
        arrives_whole: Whether a peer computes the KV and sends it before Begin.
        is_open: Whether the prompt may still grow or change, by Revise; it may be empty then.
        num_final: Leading tokens of an open prompt that stay as they are: others may find their blocks.
    """

    spec: SequenceSpec
    goal: Goal
    sink: EventSink
    arrives_whole: bool = False
    is_open: bool = False
    num_final: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Revise:
    """Give an open prompt its next version.

    The last token of an open prompt is known but not computed, so that a close which adds nothing has one to sample
    from. What KV is present of the kept tokens stays; a shared block in which they end is let go.
    """

    sequence_id: SequenceId
    revision: Revision


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """No transfer reads the blocks that the last `num_progress` unsettled Progress events of a sequence told of.

    An open sequence whose goal is the first token gives up its blocks only when all are settled; from then on they
    may be anybody's.
    """

    sequence_id: SequenceId
    num_progress: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Ask for a Progress event of a sequence that has blocks; one that has none sends it when it has."""

    sequence_id: SequenceId


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """Start computing an admitted sequence.

    Attributes:
        num_present: Leading tokens whose KV is in its blocks now (local cache, fetched, or
            pushed by a peer). If it is the number of known tokens, `first` must be given.
        first: The token sampled elsewhere after the last known token; decoding goes on after it.
            The engine emits it as its first Sampled event (it may already finish the sequence).
    """

    sequence_id: SequenceId
    num_present: int
    first: Token | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StartEarly:
    """Compute the first chunk of an admitted sequence while the KV before it still lands, layer after layer.

    A try: nothing of the step counts unless `landing` ends well in time. Begin follows in any case, and starts the
    sequence if this did not.
    """

    sequence_id: SequenceId
    landing: Landing


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """KV has landed in the blocks of an admitted sequence that cannot go on: others may find it after its Close.

    Attributes:
        num_present: Leading tokens whose KV is in its blocks.
    """

    sequence_id: SequenceId
    num_present: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """End a sequence in any state and drop its lease; unknown ids are ignored."""

    sequence_id: SequenceId


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Keep cached blocks in place under a lease of their own while a transfer reads them.

    Attributes:
        owner: Whose work it is, for lists of holders.
        reader: Who else reads them; empty when nobody does.
        epoch: Lifetime of the reader's process.
        reply: Called on the engine's thread with the leading blocks still present, maybe none.
    """

    lease_id: str
    block_hashes: tuple[BlockHash, ...]
    deadline_s: float
    owner: str = "pin"
    reader: str = ""
    epoch: str = ""
    reply: Callable[[tuple[BlockId, ...]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpin:
    """End a pin; unknown ids are ignored."""

    lease_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldWriter:
    """Count a foreign or local transfer that writes into a sequence's blocks.

    While it is held the blocks are not reused even when their leases end (quarantine).
    """

    writer_id: str
    block_ids: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseWriter:
    """The writer has settled; unknown ids are ignored."""

    writer_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """Let nobody find a cached block any more: its bytes are not what they should be. Who holds it keeps it.

    Attributes:
        reply: Called on the engine's thread with whether the block was here.
    """

    block_hash: BlockHash
    reply: Callable[[bool], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListHolders:
    """Ask who holds blocks.

    Attributes:
        reply: Called on the engine's thread with every lease and writer.
    """

    reply: Callable[[tuple[Holder, ...]], None]


EngineCommand: TypeAlias = (
    Open
    | Revise
    | Settle
    | Report
    | Begin
    | StartEarly
    | Keep
    | Close
    | Pin
    | Unpin
    | HoldWriter
    | ReleaseWriter
    | Quarantine
    | ListHolders
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheChange:
    """Full blocks that came into or left the local prefix cache, for the global index.

    Attributes:
        decoded: Those of the stored blocks that hold tokens which were generated here.
        described: The stored blocks with their tokens, where the engine is asked for that.
    """

    stored: tuple[BlockHash, ...] = ()
    decoded: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()
    described: tuple[ChainedBlock, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot that the event loop may read at any time.

    `free_blocks + cached_blocks + leased_blocks == total_blocks` always.
    """

    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0
    total_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    leased_blocks: int = 0
    num_leases: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    computed_tokens: int = 0
    busy_s: float = 0.0
