"""What an engine step does, as a value."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from headrace.core.block import BlockHash, BlockId
from headrace.core.request import SequenceId


class Phase(Enum):
    """What a work item computes."""

    PREFILL = "prefill"
    DECODE = "decode"


class Interrupt(Enum):
    """Where a running item may be stopped."""

    NONE = "none"
    LAYER = "layer"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkItem:
    """A rectangle in token x layer space of one sequence.

    Attributes:
        sequence_id: Whose work it is.
        phase: What it computes.
        tokens: Half-open range of token indices whose KV the item computes.
        layers: Half-open range of layers.
        sample: Whether the last token's logits choose a token.
        lane: Device share the item runs on.
        graph_key: Captured graph to replay, if any.
        pack_row: Row of the packed batch, if packing chose one.
        interrupt: Where the item may be stopped.
    """

    sequence_id: SequenceId
    phase: Phase
    tokens: tuple[int, int]
    layers: tuple[int, int]
    sample: bool
    lane: int = 0
    graph_key: str | None = None
    pack_row: int | None = None
    interrupt: Interrupt = Interrupt.NONE

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this item."""
        return self.tokens[1] - self.tokens[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Everything one step does; made without side effects, then applied.

    Attributes:
        items: Work of the step, in the order it is packed.
        admit: Waiting sequences that get blocks for all their known tokens.
        extend: Held sequences that get blocks for tokens which they were given later.
        evict: Running or held sequences that give up their blocks.
        save: Those of them whose KV is kept in host memory; the others' is computed again.
        wake_at: Time at which to plan again when there are no items; None waits for an event.
    """

    items: tuple[WorkItem, ...] = ()
    admit: tuple[SequenceId, ...] = ()
    extend: tuple[SequenceId, ...] = ()
    evict: tuple[SequenceId, ...] = ()
    save: tuple[SequenceId, ...] = ()
    wake_at: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step."""
        return sum(item.num_tokens for item in self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceView:
    """What a scheduling policy may know of a sequence.

    Attributes:
        arrival: Order of arrival in this engine, from 0; kept over preemption.
        num_tokens: Tokens that may be computed: prompt and output, without the last one of an open prompt.
        num_computed: Leading tokens whose KV is present.
        num_blocks: Blocks its table holds.
        num_blocks_to_admit: Blocks that its admission, or its extension, takes from the available ones, at most.
        num_exclusive_blocks: Blocks that its eviction makes available, at least.
        exclusive_blocks: They, of an open sequence whose blocks others may ask for.
        matched_blocks: Blocks that its admission would share, whoever holds them now.
        is_held: Whether it has blocks but may not compute yet: its KV is on its way.
        is_decoding: Whether it has generated here.
        is_running: Whether it takes part in steps; the others wait for blocks.
        is_extending: Whether it is held and needs blocks for tokens that it was given later.
        is_open: Whether its prompt may still grow or change: no token is sampled from it.
        is_stalled: Whether it is open and has not heard of its prompt for long, and nothing of that is left to do here.
        revised_s: When its prompt last grew or changed, on the engine's clock.
        kept_share: Share of its computed tokens that survived its revisions, by experience.
        can_evict: Whether it may be preempted (a sequence whose KV is being pushed may not).
        block_hashes: Names of its full blocks that others may share, in order; not to be changed.
        num_present_blocks: Leading ones of them whose KV can be shared now.
        arrives_whole: Whether the rest comes from a peer, all at once, and is not computed here.
        deadline_s: Deadline on the engine's clock.
    """

    sequence_id: SequenceId
    arrival: int
    num_tokens: int
    num_computed: int
    num_blocks: int
    num_blocks_to_admit: int = 0
    num_exclusive_blocks: int = 0
    exclusive_blocks: frozenset[BlockId] = frozenset()
    matched_blocks: frozenset[BlockId] = frozenset()
    is_running: bool
    is_held: bool = False
    is_decoding: bool = False
    is_extending: bool = False
    is_open: bool = False
    is_stalled: bool = False
    revised_s: float = 0.0
    kept_share: float = 1.0
    can_evict: bool = True
    block_hashes: Sequence[BlockHash] = ()
    num_present_blocks: int = 0
    arrives_whole: bool = False
    deadline_s: float = float("inf")

    @property
    def num_remaining(self) -> int:
        """Tokens whose KV is still to be computed; 1 while decoding."""
        return self.num_tokens - self.num_computed


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapView:
    """What a policy may know of the host memory that KV can be kept in.

    Attributes:
        num_free_blocks: Blocks that it still has room for.
        save_s: Seconds that copying a block there takes, as measured.
        load_s: Seconds that copying a block back takes.
    """

    num_free_blocks: int = 0
    save_s: float = 0.0
    load_s: float = 0.0


NO_SWAP = SwapView()


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerView:
    """What a scheduling policy may know of an engine.

    Attributes:
        sequences: All schedulable sequences, in any order.
        num_available: Blocks that can be taken now: free ones and cached ones nobody uses.
        block_tokens: Tokens per block.
        num_layers: Layers of the model.
        token_budget: Most tokens of one step.
        max_running: Most sequences that may hold blocks.
        num_done: Sequences that hold blocks and are not scheduled any more: their owner has not closed them.
        num_leaving: Of them, those that were evicted while a peer sent their KV.
        num_leaving_blocks: Blocks that these give back.
        swap: Host memory for KV.
    """

    sequences: tuple[SequenceView, ...] = field(default=())
    num_available: int
    block_tokens: int
    num_layers: int
    token_budget: int
    max_running: int
    num_done: int = 0
    num_leaving: int = 0
    num_leaving_blocks: int = 0
    swap: SwapView = NO_SWAP
