"""Bounds of an engine."""

from dataclasses import dataclass

from headrace.core.cost import CostModel


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Bounds of an engine.

    Attributes:
        num_blocks: Size of the pool.
        token_budget: Most tokens of one step.
        max_running: Most sequences that hold blocks.
        fingerprint: Digest of the model, under which blocks are hashed.
        cost: What steps cost: prompts that cannot be computed before their deadline are refused by it. None
            refuses none.
        describes_stored: Whether changes of the cache carry the tokens of stored blocks.
        num_swap_blocks: Most blocks of preempted sequences that are kept in host memory.
        stall_s: Seconds after which an open prompt of which nothing is heard has stalled.
    """

    num_blocks: int
    token_budget: int
    max_running: int
    fingerprint: str
    cost: CostModel | None = None
    describes_stored: bool = False
    num_swap_blocks: int = 0
    stall_s: float = 1.0
