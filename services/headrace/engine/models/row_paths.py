"""Which of two computations of a model takes a step, by its number of rows, from times measured at start.

The C++ kernels read the weights in their own grid, which wins where a step has few rows and the memory decides. With
many rows the arithmetic decides, and there torch's bf16 product may be several times faster on a CPU that has
instructions for it.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import torch

from headrace.clock import Clock
from headrace.core.block import blocks_for
from headrace.engine.kept_file import KeptFile
from headrace.engine.models.decoder import StepInputs
from headrace.engine.models.spec import ModelSpec
from headrace.engine.models.weights import WeightSource
from headrace_kernels.attend import AttendPlan
from headrace_kernels.native import Grid
from headrace_kernels.write_kv import WritePlan

ROWS = tuple(2**power for power in range(10))
"""Numbers of rows that are measured, 1 to 512."""

MARGIN = 1.5
"""How many times faster torch must be for the most rows: a second copy of the weights has to pay.

A layer of SmolLM2 with bf16 weights took the kernels 0.8 to 1.1 times as long as torch for 512 rows, 1.28 times in one
of ten tables; up to 1.6 for 64 to 256 (2-core Zen 3 beside other work, 2026-11-21). Products in bf16 instructions are
several times faster.
"""

CLEARLY_FASTER = 1.1
"""How many times faster torch must be to take a step, once its weights are there: two timings are noisy."""

QUIET_ROUNDS = 3
"""Rounds in a row that must find no time clearly shorter before a first table is believed.

The first round pays for memory, and any may be disturbed: with two rounds in all, one of six starts found torch as
slow as the kernels where it is twice as fast (2-core Xeon, 2026-11-22).
"""

CLEARLY_SHORTER = 0.95
"""Share of the least time so far below which a time is clearly shorter."""

LIMIT_S = 2.0
"""Longest time of measuring; a first start with SmolLM2 takes all of it, later ones 0.3 s (quiet 2-core Xeon)."""

LEAST_KEPT = 64
"""Rows that a table must reach to be kept: a large model gets no further, a busy machine hardly as far."""

SAMPLE_BYTES = 24 << 20
"""bf16 weights of the layers that are timed. What a step costs beside its layers is small against them then: with one
layer of SmolLM2 torch was 1.2 times as fast as the kernels for 64 rows, with all it is 1.6 times (2-core Xeon)."""

_BLOCK_TOKENS = 16
_VOCABULARY = 32
_SETTLE_BYTES = 64 << 20


class Computation(Protocol):
    """A decoder of either kind."""

    def __call__(self, step: StepInputs, arena: torch.Tensor, threads: Callable[[], int] | None = None) -> torch.Tensor:
        """Compute a step; see `headrace.engine.models.decoder.Decoder.__call__`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTable:
    """What the first layers take either way; the three lists are of one length.

    Attributes:
        rows: Numbers of rows, ascending.
        native_s: Seconds of the C++ kernels.
        torch_s: Seconds of torch with bf16 weights.
    """

    rows: tuple[int, ...]
    native_s: tuple[float, ...]
    torch_s: tuple[float, ...]

    @property
    def gains(self) -> tuple[float, ...]:
        """How many times faster torch is."""
        return tuple(native / plain for native, plain in zip(self.native_s, self.torch_s, strict=True))

    @property
    def torch_from(self) -> int | None:
        """Least number of rows from which on torch is clearly faster wherever it was measured.

        None without one, or if the most rows do not gain enough for a second copy of the weights.
        """
        found = None
        for rows, gain in zip(reversed(self.rows), reversed(self.gains), strict=True):
            if gain < (MARGIN if found is None else CLEARLY_FASTER):
                break
            found = rows
        return found


class RowsDecoder:
    """Two computations of one model: steps of few rows take the C++ kernels, those of many take torch.

    Both read and write the same bf16 KV, so a sequence may change from one to the other with every step.

    Attributes:
        torch_from: Least number of rows that torch takes.
    """

    def __init__(self, native: Computation, plain: Computation, *, torch_from: int, most_threads: int) -> None:
        """Join two decoders of the same weights.

        Args:
            native: Takes steps of fewer rows.
            plain: Takes the others.
            torch_from: Least number of rows that `plain` takes.
            most_threads: Threads of `plain` where a step names none: torch has one left after a native step.
        """
        self._native, self._plain = native, plain
        self.torch_from = torch_from
        self._all_threads = lambda: most_threads

    def __call__(self, step: StepInputs, arena: torch.Tensor, threads: Callable[[], int] | None = None) -> torch.Tensor:
        """Compute a step; see `Decoder.__call__`."""
        if step.token_ids.shape[0] < self.torch_from:
            return self._native(step, arena, threads)
        return self._plain(step, arena, threads or self._all_threads)


class FirstLayers:
    """Weights of the first layers of a model, with next to no vocabulary."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    @property
    def has_grid(self) -> bool:
        """Whether any weight is in a grid."""
        return self._source.has_grid

    def has(self, name: str, layer: int | None = None) -> bool:
        """Return whether there is such a weight."""
        return self._source.has(name, layer)

    def read(
        self, name: str, shape: tuple[int, ...], layer: int | None = None, *, kind: str = "weight"
    ) -> torch.Tensor:
        """Return a weight of a layer, or noise for a vocabulary."""
        return torch.randn(shape) if name == "embedding" else self._source.read(name, shape, layer, kind=kind)

    def read_grid(self, name: str, shape: tuple[int, int], layer: int | None = None) -> Grid | None:
        """Return a weight in its grid."""
        return None if name == "embedding" else self._source.read_grid(name, shape, layer)


def first_layers(spec: ModelSpec) -> ModelSpec:
    """Return the model that `FirstLayers` has the weights of: as few layers as tell what one costs."""
    heads = 2 * spec.num_heads + 2 * spec.num_kv_heads
    num_weights = spec.hidden_size * (heads * spec.head_dim + 3 * spec.mlp_size)
    num_layers = max(1, SAMPLE_BYTES // (2 * num_weights))
    return replace(spec, layers=spec.layers[:num_layers], vocab_size=_VOCABULARY, is_tied=True)


def known_table(kept: KeptFile | None) -> RowTable | None:
    """Return the table that an earlier start kept; None if there is none that makes sense, or no file for one."""
    found = None if kept is None else kept.read()
    if not isinstance(found, dict) or not all(isinstance(values, list) for values in found.values()):
        return None
    try:
        table = RowTable(**{name: tuple(values) for name, values in found.items()})
    except TypeError:
        return None
    is_whole = is_enough(table) and len(table.native_s) == len(table.torch_s) == len(table.rows)
    seconds = (*table.native_s, *table.torch_s)
    is_sound = all(isinstance(time_s, float) and 0 < time_s < math.inf for time_s in seconds)
    return table if is_whole and is_sound else None


def is_enough(table: RowTable) -> bool:
    """Return whether a table tells few rows from many: it has all numbers of rows up to `LEAST_KEPT`, or beyond."""
    return table.rows == ROWS[: len(table.rows)] and LEAST_KEPT in table.rows


def keep_table(kept: KeptFile | None, table: RowTable) -> None:
    """Keep a table for the next start if it tells enough and there is a file for one."""
    if kept is not None and is_enough(table):
        kept.write(asdict(table))


@torch.inference_mode()
def measure(  # noqa: PLR0913 what is measured, how, and what is known of it
    native: Computation,
    plain: Computation,
    spec: ModelSpec,
    threads: Callable[[], int],
    clock: Clock,
    limit_s: float = LIMIT_S,
    known: RowTable | None = None,
) -> RowTable:
    """Time both computations of a few layers in turns, round after round, and take the least time of each.

    Whole layers and not their products alone: with bf16 weights torch's products are faster from 32 rows on even on a
    CPU without bf16 instructions, and its attention and small operations take that back. A step is one prompt.

    A busy machine makes times longer and never shorter, and those of torch more than those of the kernels, for its
    threads wait for each other: on one such start torch was believed faster from 512 rows on, where it is from 64. So
    the least times of earlier starts count too, and every start adds a round, or more if that finds shorter times.

    Args:
        native: The C++ kernels.
        plain: Torch.
        spec: What either computes, from `first_layers`.
        threads: Asked for the threads of either.
        clock: Measures.
        limit_s: No step is begun that would end after it, as far as those before it tell: a large model or a slow
            machine measures fewer rows, and the choice made at the most of them holds for all above.
        known: Least times of earlier starts.
    """
    end_s = clock.now() + limit_s
    stopwatch = _Stopwatch(spec, threads, clock)
    best = {} if known is None else dict(zip(known.rows, zip(known.native_s, known.torch_s, strict=True), strict=True))
    num_wanted = QUIET_ROUNDS if known is None else 1
    num_quiet, is_first, is_late = 0, True, False
    while num_quiet < num_wanted and not is_late:
        last_s, is_quiet = 0.0, True
        for rows in ROWS if is_first else tuple(best):
            # Twice as many rows take at most twice as long; and what is new must be timed again, as must all before.
            expected_s = sum(best[rows]) if rows in best else 4 * last_s + sum(map(sum, best.values()))
            if clock.now() + expected_s > end_s:
                is_late = not is_first
                break
            taken = stopwatch.seconds(rows, native, plain)
            last_s = sum(taken)
            before = best.get(rows, (math.inf, math.inf))
            best[rows] = (min(taken[0], before[0]), min(taken[1], before[1]))
            is_quiet &= all(now >= CLEARLY_SHORTER * least for now, least in zip(taken, before, strict=True))
        num_quiet, is_first = num_quiet + 1 if is_quiet else 0, False
    stopwatch.close()
    return RowTable(
        rows=tuple(best),
        native_s=tuple(native_s for native_s, _ in best.values()),
        torch_s=tuple(torch_s for _, torch_s in best.values()),
    )


class _Stopwatch:
    """Times steps of both computations, each time from the same state of caches and threads."""

    def __init__(self, spec: ModelSpec, threads: Callable[[], int], clock: Clock) -> None:
        self._threads, self._clock = threads, clock
        self._torch_threads = torch.get_num_threads()
        self._arena = torch.zeros(
            (
                blocks_for(ROWS[-1], _BLOCK_TOKENS),
                len(spec.layers),
                2,
                _BLOCK_TOKENS,
                spec.num_kv_heads,
                spec.head_dim,
            ),
            dtype=torch.bfloat16,
        )
        self._scratch = torch.zeros(_SETTLE_BYTES // 4)

    def seconds(self, rows: int, native: Computation, plain: Computation) -> tuple[float, float]:
        # A few layers may stay in the cache, unlike a model. And torch's helpers spin for 5 ms after their last work:
        # native steps of 0.5 ms took 5 on their cores (2-core Zen 3, 2026-11-21), so native comes first.
        torch.set_num_threads(1)
        self._scratch.sum()
        return self._taken(native, rows), self._taken(plain, rows)

    def _taken(self, compute: Computation, rows: int) -> float:
        step = _prompt(rows)
        begun_s = self._clock.now()
        compute(step, self._arena, self._threads)
        return self._clock.now() - begun_s

    def close(self) -> None:
        torch.set_num_threads(self._torch_threads)


def _prompt(rows: int) -> StepInputs:
    """Return a step of one prompt in the first blocks."""
    positions = torch.arange(rows)
    return StepInputs(
        token_ids=positions % _VOCABULARY,
        positions=positions,
        write=WritePlan(blocks=positions // _BLOCK_TOKENS, slots=positions % _BLOCK_TOKENS),
        attend=AttendPlan(
            cu_seqlens=torch.tensor([0, rows]),
            block_tables=torch.arange(blocks_for(rows, _BLOCK_TOKENS))[None],
            kv_lengths=torch.tensor([rows]),
        ),
        sample_rows=torch.tensor([rows - 1]),
    )
