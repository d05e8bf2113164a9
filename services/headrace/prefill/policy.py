"""What to push, and when: pure decisions of the prefill role."""

from dataclasses import dataclass

from headrace.core.block import blocks_for


@dataclass(frozen=True, slots=True, kw_only=True)
class PushRange:
    """Blocks [start, end) of a sequence, by their place in its table."""

    start: int
    end: int


def next_push(num_pushed_blocks: int, num_computed: int, block_tokens: int, *, is_last: bool) -> PushRange | None:
    """Return the blocks that are complete and not yet pushed, or None.

    Args:
        num_pushed_blocks: Leading blocks that are queued, pushed or already at the receiver.
        num_computed: Leading tokens whose KV is present here.
        block_tokens: Tokens per block.
        is_last: Whether the prompt is complete, so that a partly filled last block goes too.
    """
    end = blocks_for(num_computed, block_tokens) if is_last else num_computed // block_tokens
    return PushRange(start=num_pushed_blocks, end=end) if end > num_pushed_blocks else None
