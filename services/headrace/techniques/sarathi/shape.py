"""Steps of near-constant size: decodes first, then prompt chunks within a budget of tokens or of time."""

from collections.abc import Sequence

from headrace.core.cost import CostModel, chunk_work, decode_work
from headrace.core.plan import SequenceView
from headrace.errors import ConfigError
from headrace.seams.shape import ShapeContext

LEAST_CHUNK_TOKENS = 8
"""A chunk under a target of time is no smaller: where decodes alone miss the target, prompts must not starve."""

DEFAULT_CONTEXT = ShapeContext()


class ChunkedShape:
    """The Sarathi-Serve order of a step: every decode, then prompts in rank order until the budget is used.

    Decodes ride on weights that the chunk loads anyway, and a long prompt no longer stalls them.

    Args:
        context: Without a target the budget is one of tokens. With a target, steps that carry decodes end within
            it as far as the cost model knows; steps without use the whole token budget, for nobody waits.
            Dynamic chunks end when a step of the whole token budget at a prompt's start would.

    Raises:
        ConfigError: a target or dynamic chunks are asked for, and steps were not measured.
    """

    def __init__(self, context: ShapeContext = DEFAULT_CONTEXT) -> None:
        self._cost = context.cost
        self._tbt_target_s = context.tbt_target_s
        self._is_dynamic = context.is_dynamic
        if self._cost is None and (self._is_dynamic or self._tbt_target_s is not None):
            field = "dynamic_chunks" if self._is_dynamic else "tbt_target_ms"
            raise ConfigError(f"{field} needs the cost of steps: switch calibrate on", field=field)

    def cut(self, running: Sequence[SequenceView], token_budget: int) -> tuple[tuple[SequenceView, int], ...]:
        """Return one token per decode and at most `token_budget` tokens in all, decodes apart."""
        decodes = [(sequence, 1) for sequence in running if sequence.num_remaining == 1]
        # A budget that decodes use up still lets prompts move: one token a step at least.
        room = max(1, token_budget - len(decodes))
        prompts = [sequence for sequence in running if sequence.num_remaining > 1]
        limit_s = self._limit_s(token_budget, has_decodes=bool(decodes))
        if self._cost is None or limit_s is None:
            return (*decodes, *_cut_by_tokens(prompts, room))
        contexts = [sequence.num_tokens for sequence, _ in decodes]
        return (*decodes, *_cut_by_time(prompts, contexts, room, limit_s, self._cost))

    def _limit_s(self, token_budget: int, *, has_decodes: bool) -> float | None:
        """Return how long a step may take, or None if only its tokens count."""
        limits: list[float] = []
        if self._tbt_target_s is not None and has_decodes:
            limits.append(self._tbt_target_s)
        if self._cost is not None and self._is_dynamic:
            limits.append(self._cost.step([(token_budget, 0)]))
        return min(limits, default=None)


def _cut_by_tokens(prompts: Sequence[SequenceView], room: int) -> list[tuple[SequenceView, int]]:
    chunks: list[tuple[SequenceView, int]] = []
    for sequence in prompts:
        if room <= 0:
            break
        size = min(sequence.num_remaining, room)
        chunks.append((sequence, size))
        room -= size
    return chunks


def _cut_by_time(
    prompts: Sequence[SequenceView], contexts: Sequence[int], room: int, limit_s: float, cost: CostModel
) -> list[tuple[SequenceView, int]]:
    """Cut within tokens and time; the first prompt moves in any case."""
    chunks: list[tuple[SequenceView, int]] = []
    aboard = decode_work(contexts)
    for sequence in prompts:
        most, done = min(sequence.num_remaining, room), sequence.num_computed
        if most <= 0:
            break
        size = cost.largest_chunk(limit_s, aboard, done, most)
        if not chunks:
            size = max(size, min(most, LEAST_CHUNK_TOKENS))
        elif cost.seconds(aboard + chunk_work(size, done)) > limit_s:
            break
        chunks.append((sequence, size))
        aboard += chunk_work(size, done)
        room -= size
    return chunks
