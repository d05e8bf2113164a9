"""What a step costs: one formula over what is in it, fitted on measured steps."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import numpy.typing as npt

from headrace.errors import InvalidRequest

SOUND_R2 = 0.9
"""Below it a fit explains its samples badly: it is shown with a warning, and refuses nobody."""

CERTAIN_SHARE = 0.5
"""Share of an estimate that a machine certainly needs: half leaves room for a fit on one that was busy."""

_NUM_WIDE = 3

_Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What the time of a step depends on; adds up over the parts of a step.

    Attributes:
        prompt_tokens: Prompt tokens computed.
        prompt_pairs: Pairs of such a token and a token that it attends to, itself included.
        num_decodes: Sequences that compute one token after their prompt.
        context_tokens: Tokens that those attend to, in all.
    """

    prompt_tokens: int = 0
    prompt_pairs: int = 0
    num_decodes: int = 0
    context_tokens: int = 0

    @property
    def num_rows(self) -> int:
        """Tokens computed."""
        return self.prompt_tokens + self.num_decodes

    def __add__(self, other: "StepWork") -> "StepWork":
        """Return the work of both in one step."""
        return StepWork(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            prompt_pairs=self.prompt_pairs + other.prompt_pairs,
            num_decodes=self.num_decodes + other.num_decodes,
            context_tokens=self.context_tokens + other.context_tokens,
        )


NOTHING = StepWork()


def chunk_work(num_tokens: int, num_done: int) -> StepWork:
    """Return the work of `num_tokens` of a prompt of which `num_done` are computed."""
    # ((d + k)^2 - d^2) / 2, with the diagonal: token i of the chunk attends to d + i + 1 tokens.
    pairs = num_tokens * num_done + num_tokens * (num_tokens + 1) // 2
    return StepWork(prompt_tokens=num_tokens, prompt_pairs=pairs)


def decode_work(contexts: Iterable[int]) -> StepWork:
    """Return the work of one token for each sequence.

    Args:
        contexts: Tokens that each of them attends to.
    """
    sizes = tuple(contexts)
    return StepWork(num_decodes=len(sizes), context_tokens=sum(sizes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A measured step.

    Attributes:
        work: What was in it.
        seconds: How long it took, above 0.
    """

    work: StepWork
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds of a step of one instance, linear in what is in it; no coefficient is negative.

    Chunks and decodes add up in one step, so one formula answers for steps of either kind and for mixed ones:
    what a decode gains by riding along is the `step_s` that it does not pay again. Where steps of many rows are
    computed another way, such as by a CPU's matrix instructions, what prompts cost in them has coefficients of its
    own, and a larger step may take less time than a smaller one.

    Attributes:
        step_s: Seconds of any step: reading the weights once, launching every operation.
        prompt_s: Seconds more of a step that has prompt tokens: kernels for many rows.
        token_s: Seconds per prompt token.
        pair_s: Seconds per pair of a prompt token and a token that it attends to.
        decode_s: Seconds per decoding sequence.
        context_s: Seconds per token that a decode attends to.
        wide_from: Rows, prompt tokens and decodes, from which on a step is computed another way; 0 if none is.
        wide_prompt_s: What `prompt_s` is in those steps.
        wide_token_s: What `token_s` is in those steps.
        wide_pair_s: What `pair_s` is in those steps.
        r2: Share of the samples' variance that the fit explains, at most 1; adjusted for how many coefficients it
            took, and 0 where there were no more samples than those: such a fit explains anything. Of all steps and of
            those of many rows apart it is the lower.
    """

    step_s: float
    prompt_s: float
    token_s: float
    pair_s: float
    decode_s: float
    context_s: float
    wide_from: int = 0
    wide_prompt_s: float = 0.0
    wide_token_s: float = 0.0
    wide_pair_s: float = 0.0
    r2: float = 1.0

    @property
    def is_sound(self) -> bool:
        """Whether the fit explains its samples well enough to refuse work by."""
        return self.r2 >= SOUND_R2

    def seconds(self, work: StepWork) -> float:
        """Return the seconds of one step; a step of nothing takes none."""
        if work == NOTHING:
            return 0.0
        aboard_s = self.decode_s * work.num_decodes + self.context_s * work.context_tokens
        if not work.prompt_tokens:
            return self.step_s + aboard_s
        return aboard_s + self._prompt(work.prompt_tokens, work.prompt_pairs, work.num_rows)

    def step(self, chunks: Iterable[tuple[int, int]] = (), contexts: Iterable[int] = ()) -> float:
        """Return the seconds of a step of chunks, decodes or both.

        Args:
            chunks: Pairs (prompt tokens, tokens of the same prompt computed before).
            contexts: Tokens that each decode attends to.
        """
        return self.seconds(sum((chunk_work(*chunk) for chunk in chunks), decode_work(contexts)))

    def prefill(self, num_tokens: int, num_done: int = 0, *, chunk_tokens: int | None = None) -> float:
        """Return the seconds of a whole prompt, alone.

        Args:
            num_tokens: Tokens to compute.
            num_done: Tokens of the prompt whose KV is present.
            chunk_tokens: Most tokens of a step; None computes all in one.
        """
        if num_tokens <= 0:
            return 0.0
        chunk = min(num_tokens, chunk_tokens or num_tokens)
        num_full, num_rest = divmod(num_tokens, chunk)
        num_first = num_tokens - num_rest
        # The pairs of consecutive chunks add up to those of one. No values are built: a plan asks a hundred times.
        seconds = self._prompt(num_first, num_first * (2 * num_done + num_first + 1) // 2, chunk, num_full)
        if num_rest:
            num_done += num_first
            seconds += self._prompt(num_rest, num_rest * (2 * num_done + num_rest + 1) // 2, num_rest)
        return seconds

    def prefill_token_s(self, num_rows: int) -> float:
        """Return the seconds of a prompt token in a step of so many rows, without what it attends to."""
        return self.wide_token_s if self._is_wide(num_rows) else self.token_s

    def least_prefill_s(self, num_tokens: int, num_done: int = 0) -> float:
        """Return seconds that the rest of a prompt takes for certain, even alone and first; a bound to refuse by."""
        # Decodes aboard may make a step wide that would not be.
        models = (replace(self, wide_from=0), replace(self, wide_from=1)) if self.wide_from else (self,)
        return CERTAIN_SHARE * min(model.prefill(num_tokens, num_done) for model in models)

    def decode(self, num_sequences: int, context_tokens: int) -> float:
        """Return the seconds of one token for each of `num_sequences`, which attend to `context_tokens` in all."""
        return self.seconds(StepWork(num_decodes=num_sequences, context_tokens=context_tokens))

    def largest_chunk(self, target_s: float, aboard: StepWork, num_done: int, most: int) -> int:
        """Return the most tokens that a prompt may add to a step so that it still ends in time; at least 1.

        Args:
            target_s: When the step is to end, in seconds from its start.
            aboard: What the step has already.
            num_done: Tokens of the prompt computed before.
            most: Largest answer.
        """

        def largest(sizes: range) -> int:
            num = bisect_right(sizes, target_s, key=lambda size: self.seconds(aboard + chunk_work(size, num_done)))
            return sizes[num - 1] if num else 0

        # Time grows with the size but where wide steps begin.
        first_wide = max(1, self.wide_from - aboard.num_rows) if self.wide_from else most + 1
        return largest(range(first_wide, most + 1)) or largest(range(1, min(first_wide, most + 1))) or 1

    def _is_wide(self, num_rows: int) -> bool:
        return 0 < self.wide_from <= num_rows

    def _prompt(self, num_tokens: int, num_pairs: int, num_rows: int, num_steps: int = 1) -> float:
        """Return the seconds of steps of so many rows each, of which these tokens are prompts', without decodes."""
        if self._is_wide(num_rows):
            each_s = self.step_s + self.wide_prompt_s
            return num_steps * each_s + self.wide_token_s * num_tokens + self.wide_pair_s * num_pairs
        return num_steps * (self.step_s + self.prompt_s) + self.token_s * num_tokens + self.pair_s * num_pairs


def fit(samples: Sequence[Sample], wide_from: int = 0) -> CostModel:
    """Return the model of least squared relative error, without negative coefficients.

    Relative, because a step of one decode is to be right by a millisecond and one of a long chunk by many.

    Args:
        samples: Measured steps.
        wide_from: Rows from which on steps are computed another way, or 0. Without enough samples of those with
            prompt tokens the fit is not sound.

    Raises:
        InvalidRequest: there is no sample, or one took no time.
    """
    if not samples or min(sample.seconds for sample in samples) <= 0:
        raise InvalidRequest(f"a fit needs steps that took time; found {len(samples)} samples", field="samples")
    is_wide = np.array([_is_wide_prompt(sample.work, wide_from) for sample in samples])
    rows = np.array([_row(sample.work, wide_from) for sample in samples], dtype=np.float64)
    seconds = np.array([sample.seconds for sample in samples], dtype=np.float64)
    found = _non_negative(rows / seconds[:, None])
    r2 = _adjusted_r2(seconds, rows @ found, int((found > 0).sum()))
    if wide_from:
        wide = rows[is_wide, -_NUM_WIDE:]
        # Fewer different steps than coefficients tell nothing of other steps.
        is_enough = len(wide) > 0 and np.linalg.matrix_rank(wide / wide.max(axis=0)) == _NUM_WIDE
        r2 = min(r2, _adjusted_r2(seconds[is_wide], (rows @ found)[is_wide], _NUM_WIDE) if is_enough else 0.0)
    step_s, decode_s, context_s, *prompts = (float(value) for value in found)
    prompt_s, token_s, pair_s, wide_prompt_s, wide_token_s, wide_pair_s = prompts
    return CostModel(
        step_s=step_s,
        prompt_s=prompt_s,
        token_s=token_s,
        pair_s=pair_s,
        decode_s=decode_s,
        context_s=context_s,
        wide_from=wide_from,
        wide_prompt_s=wide_prompt_s,
        wide_token_s=wide_token_s,
        wide_pair_s=wide_pair_s,
        r2=r2,
    )


def _adjusted_r2(measured: _Vector, fitted: _Vector, num_used: int) -> float:
    num_free = len(measured) - num_used
    spread = float(((measured - measured.mean()) ** 2).sum())
    if num_free <= 0 or spread <= 0:
        return 0.0
    error = float(((measured - fitted) ** 2).sum())
    return 1.0 - error / num_free / (spread / (len(measured) - 1))


def _is_wide_prompt(work: StepWork, wide_from: int) -> bool:
    return work.prompt_tokens > 0 and 0 < wide_from <= work.num_rows


def _row(work: StepWork, wide_from: int) -> tuple[float, ...]:
    prompt = (float(work.prompt_tokens > 0), work.prompt_tokens, work.prompt_pairs)
    nothing = (0.0, 0.0, 0.0)
    prompts = (*nothing, *prompt) if _is_wide_prompt(work, wide_from) else (*prompt, *nothing)
    return (1.0, work.num_decodes, work.context_tokens, *prompts)


def _non_negative(rows: _Vector) -> _Vector:
    """Return the non-negative x of least |rows x - 1|.

    The optimum solves the plain problem on the coefficients that are above 0 in it, and with so few of them every
    set can be tried.
    """
    scale = np.abs(rows).max(axis=0)
    used = np.flatnonzero(scale)
    best, least = np.zeros(rows.shape[1]), math.inf
    for size in range(1, len(used) + 1):
        for chosen in map(list, combinations(used, size)):
            scaled = rows[:, chosen] / scale[chosen]
            found = np.linalg.lstsq(scaled, np.ones(len(rows)), rcond=None)[0]
            error = float(((scaled @ found - 1.0) ** 2).sum())
            if found.min() >= 0 and error < least:
                best, least = np.zeros(rows.shape[1]), error
                best[chosen] = found / scale[chosen]
    return best
