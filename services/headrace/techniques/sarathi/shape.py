"""Steps of near-constant size: decodes first, then prompt chunks within a token budget."""

from collections.abc import Sequence

from headrace.core.plan import SequenceView


class ChunkedShape:
    """The Sarathi-Serve order of a step: every decode, then prompts in rank order until the budget is used.

    Decodes ride on weights that the chunk loads anyway, and a long prompt no longer stalls them.
    """

    def cut(self, running: Sequence[SequenceView], token_budget: int) -> tuple[tuple[SequenceView, int], ...]:
        """Return one token per decode and at most `token_budget` tokens in all, decodes apart."""
        decodes = [(sequence, 1) for sequence in running if sequence.num_remaining == 1]
        # A budget that decodes use up still lets prompts move: one token a step at least.
        room = max(1, token_budget - len(decodes))
        chunks: list[tuple[SequenceView, int]] = []
        for sequence in running:
            if sequence.num_remaining > 1 and room > 0:
                size = min(sequence.num_remaining, room)
                chunks.append((sequence, size))
                room -= size
        return (*decodes, *chunks)
