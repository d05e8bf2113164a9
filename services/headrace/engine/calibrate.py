"""Measure what steps cost on this machine, before the first request."""

import logging
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from headrace.clock import Clock
from headrace.core.block import BlockId, blocks_for
from headrace.core.cost import CERTAIN_SHARE, CostModel, Sample, StepWork, chunk_work, decode_work, fit
from headrace.engine.arena import KvArena
from headrace.engine.batch import Batch, BatchItem, Runner, batch_item

logger = logging.getLogger(__name__)

CHECKS = 3
"""Times that each step of a check is taken; the fastest counts: the first pays for memory, any may be disturbed."""

LEAST_SAMPLES = 6
"""As many as the model has coefficients, without those of wide steps."""

_STRIDE = 7919
"""Prime, so that tokens differ and rows of the embedding are read from all over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A step to measure.

    Attributes:
        chunk: Pair (prompt tokens, tokens of the same prompt before them), if there is a chunk.
        contexts: Tokens that each decode attends to.
    """

    chunk: tuple[int, int] | None = None
    contexts: tuple[int, ...] = ()

    @property
    def work(self) -> StepWork:
        """What the step computes."""
        chunk = chunk_work(*self.chunk) if self.chunk is not None else StepWork()
        return chunk + decode_work(self.contexts)

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Tokens to compute and tokens before them, per sequence."""
        decodes = tuple((1, context - 1) for context in self.contexts)
        return (*decodes, self.chunk) if self.chunk is not None else decodes


PROBES = (
    Probe(contexts=(16,)),
    Probe(chunk=(16, 0)),
    Probe(contexts=(16,) * 4),
    Probe(chunk=(16, 1024)),
    Probe(contexts=(1024,)),
    Probe(chunk=(64, 0)),
    Probe(contexts=(64,) * 16),
    Probe(contexts=(512,) * 4),
    Probe(chunk=(64, 1024)),
    Probe(contexts=(64,) * 8),
    Probe(chunk=(32, 0), contexts=(128,) * 4),
    Probe(chunk=(128, 0)),
    Probe(chunk=(128, 1024)),
)
"""Powers of two; cheap ones first, so that a slow machine has measured something of everything when time is up."""

WIDE_CHUNK = 512
"""Prompt tokens of a step by default."""

LEAST_TIMES = 2
"""Times that each step is taken if there is time; what is left of the first half is for more."""

CHECKED = (Probe(contexts=(16,)), Probe(chunk=(16, 0)))
"""The cheapest step of either kind: what weights and kernels cost is in them."""


def checked_for(wide_from: int) -> tuple[Probe, ...]:
    """Return the steps to check a kept model by."""
    return (*CHECKED, Probe(chunk=(wide_from, 0))) if wide_from else CHECKED


def agrees(cost: CostModel, runner: Runner, num_blocks: int, clock: Clock) -> bool:
    """Return whether a model of another day still tells what steps cost, from a few of them.

    It may be off by what those who use it allow for, either way: a machine that was busy then is found out too. KV
    in blocks 0 to `num_blocks` is overwritten; steps that need more are left out.
    """
    for probe in checked_for(cost.wide_from):
        if not _fits(runner, probe, num_blocks):
            continue
        taken_s = min(_seconds(runner, probe, clock) for _ in range(CHECKS))
        if not CERTAIN_SHARE <= taken_s / cost.seconds(probe.work) <= 1 / CERTAIN_SHARE:
            logger.info("kept cost disagrees", extra={"taken_s": taken_s, "kept_s": cost.seconds(probe.work)})
            return False
    logger.info("kept cost of steps taken", extra=asdict(cost))
    return True


def probes_for(wide_from: int) -> tuple[Probe, ...]:
    """Return the steps to measure where those from so many rows on are computed another way, or none is for 0."""
    if not wide_from:
        return PROBES
    wide = [Probe(chunk=(size, done)) for size in (wide_from, max(WIDE_CHUNK, 2 * wide_from)) for done in (0, 1024)]
    return tuple(dict.fromkeys((*PROBES, *wide)))


def calibrate(runner: Runner, num_blocks: int, clock: Clock, limit_s: float, wide_from: int = 0) -> CostModel | None:
    """Time steps until each was taken twice and half of `limit_s` has passed, or all of it, and fit a model to them.

    The steps go round and round; the first time of each, which pays for memory and caches, counts only if there is
    no other, and of the rest the median does. KV in blocks 0 to `num_blocks` is overwritten.

    Args:
        runner: What is measured; nobody else may use it now.
        num_blocks: Blocks that may be used; steps that need more are left out.
        clock: Measures.
        limit_s: When to stop; the step under way is finished.
        wide_from: Rows from which on the runner computes another way; 0 if it does not.

    Returns:
        The model, or None where time or blocks were too few for one.
    """
    begun_s = clock.now()
    probes = [probe for probe in probes_for(wide_from) if _fits(runner, probe, num_blocks)]
    times: dict[Probe, list[float]] = {probe: [] for probe in probes}

    def is_over() -> bool:
        is_enough = min(map(len, times.values())) >= LEAST_TIMES
        return clock.now() - begun_s >= (limit_s / 2 if is_enough else limit_s)

    while probes and not is_over():
        for probe in probes:
            if is_over():
                break
            times[probe].append(_seconds(runner, probe, clock))
    samples = [
        Sample(work=probe.work, seconds=statistics.median_low(taken[1:] or taken))
        for probe, taken in times.items()
        if taken
    ]
    if len(samples) < LEAST_SAMPLES:
        logger.warning("too few steps to model their cost", extra={"num_samples": len(samples), "limit_s": limit_s})
        return None
    cost = fit(samples, wide_from)
    level = logging.INFO if cost.is_sound else logging.WARNING
    num_steps = sum(map(len, times.values()))
    logger.log(
        level, "cost of steps measured", extra={"num_samples": len(samples), "num_steps": num_steps, **asdict(cost)}
    )
    return cost


@contextmanager
def filled(arena: KvArena, num_blocks: int) -> Iterator[None]:
    """Have noise in blocks 0 to `num_blocks`, and zeros again afterwards.

    Memory that nobody has written yet is one page of zeros, which every cache holds: reading it costs nothing.
    """
    blocks = arena.data[:num_blocks]
    blocks.copy_(torch.randn(blocks.shape[1:], device=blocks.device))
    try:
        yield
    finally:
        blocks.zero_()


def blocks_wanted(block_tokens: int, probes: Iterable[Probe] = PROBES) -> int:
    """Return how many blocks the largest step needs."""
    return max(_num_blocks(probe, block_tokens) for probe in probes)


def _num_blocks(probe: Probe, block_tokens: int) -> int:
    return sum(blocks_for(size + done, block_tokens) for size, done in probe.parts)


def _fits(runner: Runner, probe: Probe, num_blocks: int) -> bool:
    longest = max(size + done for size, done in probe.parts)
    return longest < runner.max_context_tokens and _num_blocks(probe, runner.layout.block_tokens) <= num_blocks


def _seconds(runner: Runner, probe: Probe, clock: Clock) -> float:
    batch = Batch(items=_items(probe.parts, runner.layout.block_tokens, runner.vocab_size))
    begun_s = clock.now()
    # A device computes behind the caller's back until somebody looks at the result.
    runner.run(batch)[:, 0].tolist()
    return clock.now() - begun_s


def _items(parts: Sequence[tuple[int, int]], block_tokens: int, vocab_size: int) -> tuple[BatchItem, ...]:
    items: list[BatchItem] = []
    first = 0
    for size, done in parts:
        end = first + blocks_for(size + done, block_tokens)
        tokens = [(first + index) * _STRIDE % vocab_size for index in range(size)]
        items.append(batch_item(tokens, done, [BlockId(block) for block in range(first, end)], sample=True))
        first = end
    return tuple(items)
