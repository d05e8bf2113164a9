"""What an engine step does, as a value."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from headrace.core.block import BlockHash
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
        evict: Running sequences that give up their blocks and are recomputed later.
        wake_at: Time at which to plan again when there are no items; None waits for an event.
    """

    items: tuple[WorkItem, ...] = ()
    admit: tuple[SequenceId, ...] = ()
    evict: tuple[SequenceId, ...] = ()
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
        num_tokens: Tokens known: prompt and output.
        num_computed: Leading tokens whose KV is present.
        num_blocks: Blocks its table holds.
        num_blocks_to_admit: Blocks that its admission takes from the available ones, at most.
        num_exclusive_blocks: Blocks that its eviction makes available, at least.
        is_held: Whether it has blocks but may not compute yet: its KV is on its way.
        is_decoding: Whether it has generated here.
        is_running: Whether it takes part in steps; the others wait for blocks.
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
    is_running: bool
    is_held: bool = False
    is_decoding: bool = False
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
    """

    sequences: tuple[SequenceView, ...] = field(default=())
    num_available: int
    block_tokens: int
    num_layers: int
    token_budget: int
    max_running: int
    num_done: int = 0
