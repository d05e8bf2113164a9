"""A sequence inside the engine."""

from dataclasses import dataclass, field, replace
from enum import Enum

from headrace.core.block import BlockHash, BlockId
from headrace.core.request import FinishReason, Revision, SequenceSpec
from headrace.engine.landing import Landing
from headrace.engine.messages import EventSink, Goal
from headrace.engine.swap import SavedKv

KEPT_WEIGHT = 0.5
"""Weight of the last revision in what is known of earlier ones: streams change their habits within a few."""


class State(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    """Has no blocks."""
    HELD = "held"
    """Has blocks; its KV is being fetched or pushed; waits for Begin."""
    RUNNING = "running"
    """Takes part in steps."""
    DONE = "done"
    """Computed; keeps its blocks until Close."""


@dataclass(slots=True, kw_only=True)
class Sequence:
    """Tokens, positions and blocks of one choice of one request; changed by the engine's thread only.

    Attributes:
        arrival: Order of arrival; kept over preemption.
        arrives_whole: Whether a peer sends its first KV.
        tokens: Prompt and output.
        kv_length: Leading tokens whose KV is in the blocks.
        next_position: Position of the next token computed; apart from `kv_length`, which pruning may shrink.
        blocks: Block table.
        hashes: Chained hashes of the full blocks of `tokens`, extended as blocks fill.
        has_begun: Whether Begin was given; a preempted sequence does not wait for another.
        num_named: Leading blocks that carry their name in the ledger.
        has_failed: Whether Failed was sent; only its blocks are left, until Close.
        landing: What a held sequence is started early with.
        is_streamed: Whether it was opened with an open prompt.
        is_open: Whether its prompt may still be revised.
        version: Of the prompt.
        num_final: Leading tokens that no revision changes.
        revised_s: When the prompt last grew or changed.
        kept_share: Share of its computed tokens that survived its revisions, by experience.
        pending: Revisions that wait until nothing is being fetched into its blocks.
        num_unsettled: Progress events whose blocks a transfer may still read.
        stale_writers: Holds on blocks that a revision gave up while a transfer may still read them.
        is_extending: Whether it is held and has not been given the blocks of its last version.
        saved: Its KV in host memory, after it lost its blocks.
        resting_version: Last version that was computed when it lost its blocks; None if none was.
    """

    spec: SequenceSpec
    goal: Goal
    sink: EventSink
    arrival: int
    deadline_s: float
    root: BlockHash
    arrives_whole: bool = False
    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list)
    kv_length: int = 0
    next_position: int = 0
    blocks: list[BlockId] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    has_begun: bool = False
    num_named: int = 0
    has_failed: bool = False
    landing: Landing | None = None
    is_streamed: bool = False
    is_open: bool = False
    version: int = 0
    num_final: int = 0
    revised_s: float = 0.0
    kept_share: float = 1.0
    pending: list[Revision] = field(default_factory=list)
    num_unsettled: int = 0
    stale_writers: list[str] = field(default_factory=list)
    is_extending: bool = False
    saved: SavedKv | None = None
    resting_version: int | None = None

    @property
    def lease_id(self) -> str:
        """Name of its lease in the ledger; none that a peer chose for a pin can equal it."""
        return f"sequence {self.spec.sequence_id}"

    @property
    def num_output(self) -> int:
        """Tokens generated, here or before a move."""
        return len(self.tokens) - len(self.spec.prompt)

    @property
    def num_present(self) -> int:
        """Leading tokens whose KV is in the blocks, or lands while a step computes."""
        return self.kv_length if self.landing is None else self.landing.num_present

    @property
    def num_computable(self) -> int:
        """Tokens that may be computed: the last one of an open prompt waits for the close."""
        return max(0, len(self.tokens) - self.is_open)

    @property
    def is_idle(self) -> bool:
        """Whether it is open and all that is known of its prompt is computed."""
        return self.is_open and self.num_present >= self.num_computable

    @property
    def is_decoding(self) -> bool:
        """Whether all but the last token are in the cache and the last was generated."""
        return self.kv_length == len(self.tokens) - 1 and len(self.tokens) > len(self.spec.tokens)

    def place(self, num_present: int) -> None:
        """Say that the KV of the first `num_present` tokens is in the blocks."""
        self.kv_length = num_present
        self.next_position = num_present

    def take_revision(self, revision: Revision) -> None:
        """Change the prompt; blocks and KV are the cache's to adapt."""
        if self.kv_length:
            kept = min(revision.num_kept, self.kv_length) / self.kv_length
            self.kept_share += KEPT_WEIGHT * (kept - self.kept_share)
        del self.tokens[revision.num_kept :]
        self.tokens.extend(revision.tokens)
        self.spec = replace(self.spec, prompt=tuple(self.tokens))
        self.version, self.is_open = revision.version, not revision.is_closed
        self.num_final = len(self.tokens) if revision.is_closed else revision.num_final

    def start(self, num_present: int) -> None:
        """Take part in steps from now on."""
        self.has_begun = True
        self.state = State.RUNNING
        self.landing = None
        self.place(num_present)

    def lose_blocks(self) -> None:
        """Forget the blocks; all tokens are computed again."""
        if self.is_idle:
            self.resting_version = self.version
        self.blocks.clear()
        self.place(0)
        self.num_named = 0
        self.arrives_whole = False
        self.state = State.WAITING

    def finish_reason(self, token: int, eos: frozenset[int], max_known: int) -> FinishReason | None:
        """Return why the answer ends with `token`, which is already among `tokens`, or None."""
        sampling = self.spec.sampling
        may_stop = self.num_output >= sampling.min_tokens
        if may_stop and (token in sampling.stop_token_ids or (token in eos and not sampling.ignore_eos)):
            return FinishReason.STOP
        if self.num_output >= sampling.max_tokens or len(self.tokens) >= max_known:
            return FinishReason.LENGTH
        return None
