"""The conversation trace of Mooncake: a reader of the published file, and a generator of its shape.

The file is FAST25-release/traces/conversation_trace.jsonl of the GitHub repository kvcache-ai/Mooncake (Apache-2.0;
Qin et al., "Mooncake", FAST 2025): one hour of requests, each with its arrival in milliseconds, its input and output
tokens and the names of its prefix's blocks of 512 tokens, the last of them partial.

The generator draws conversations. Matched against its README: 12,031 requests in an hour, 12,035 input tokens and 343
output tokens in the mean. Matched against what was measured on the file: the first block is everyone's (a system
prompt); 36.6 % of all blocks were seen before; 61 % of the requests reuse that first block only; the quantiles below;
a conversation goes on after its first, second, ... turn with the chances below. Not matched: the few prefixes of up
to 43 requests that are no conversation, bursts of arrivals, and what follows from either.

Run as a script it prints the figures of the file or of a generated trace.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

BLOCK_TOKENS = 512
NUM_REQUESTS = 12_031
SPAN_S = 3_537.0

FIRST_TOKENS = (890, 905, 1_000, 2_150, 6_200, 13_700, 24_500, 36_500, 84_000, 126_000)
GROWN_TOKENS = (60, 120, 190, 330, 500, 1_300, 4_500, 9_000, 26_000, 80_000)
GAP_S = (6.0, 30.0, 42.0, 66.0, 123.0, 264.0, 483.0, 615.0, 1_477.0, 2_400.0)
OUTPUT_TOKENS = (1, 10, 20, 156, 350, 472, 597, 698, 1_118, 2_000)
QUANTILES = (0.0, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)
"""Where the four tables above are read; between them values are drawn log-uniformly."""

GOES_ON = (0.34, 0.46, 0.56, 0.64, 0.66, 0.72, 0.77)
"""Chance of one more turn after the first, second, ...; above those seen, because the hour's end cuts some off."""

REWRITES = 0.14
"""Share of the later turns that leave the chain of the one before somewhere and go on otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a trace.

    Attributes:
        at_s: Arrival.
        hash_ids: Names of the prompt's blocks in order; the last may be partial.
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]

    @property
    def full_ids(self) -> tuple[int, ...]:
        """Names of the full blocks, which alone can be stored."""
        return self.hash_ids[: self.input_tokens // BLOCK_TOKENS]


def read(path: Path) -> tuple[Request, ...]:
    """Return the requests of a file in Mooncake's format.

    Raises:
        ValueError: a line is not of that format.
    """
    return tuple(_parse(line) for line in path.read_text().splitlines())


def generate(seed: int, num_requests: int = NUM_REQUESTS) -> tuple[Request, ...]:
    """Return requests of the conversation trace's shape, by arrival; a smaller number is as dense in a shorter time."""
    random = np.random.default_rng(seed)
    ids = count(1)
    span_s = SPAN_S * num_requests / NUM_REQUESTS
    requests: list[Request] = []
    while len(requests) < num_requests:
        requests += _conversation(random, ids, random.uniform(0.0, span_s), span_s)
    return tuple(sorted(requests[:num_requests], key=lambda request: request.at_s))


def conversations(requests: Sequence[Request], share: float, seed: int) -> tuple[Request, ...]:
    """Return the requests of a random share of the conversations: those that differ after the common first block."""
    random = np.random.default_rng(seed)
    kept: dict[int, bool] = {}
    return tuple(
        request
        for request in requests
        if kept.setdefault(request.hash_ids[min(1, len(request.hash_ids) - 1)], bool(random.random() < share))
    )


def _parse(line: str) -> Request:
    match json.loads(line):
        case {
            "timestamp": int() | float() as at_ms,
            "input_length": int() as input_tokens,
            "output_length": int() as output_tokens,
            "hash_ids": list() as hash_ids,
        } if len(hash_ids) == -(-input_tokens // BLOCK_TOKENS):
            return Request(
                at_s=at_ms / 1000, input_tokens=input_tokens, output_tokens=output_tokens, hash_ids=tuple(hash_ids)
            )
    raise ValueError(f"not a request of Mooncake's format with blocks of {BLOCK_TOKENS} tokens: {line[:80]}")


def _conversation(random: np.random.Generator, ids: Iterator[int], at_s: float, span_s: float) -> Iterator[Request]:
    """Yield the turns that fall into the span."""
    known: tuple[int, ...] = (0,)
    num_tokens, turn = _draw(random, FIRST_TOKENS), 0
    while at_s < span_s:
        num_blocks = -(-int(num_tokens) // BLOCK_TOKENS)
        hash_ids = (*known, *(next(ids) for _ in range(num_blocks - len(known))))[:num_blocks]
        yield Request(
            at_s=at_s, input_tokens=int(num_tokens), output_tokens=int(_draw(random, OUTPUT_TOKENS)), hash_ids=hash_ids
        )
        if random.random() >= GOES_ON[min(turn, len(GOES_ON) - 1)]:
            return
        turn += 1
        at_s += _draw(random, GAP_S)
        known = hash_ids[: int(num_tokens) // BLOCK_TOKENS] or (0,)
        if random.random() < REWRITES:
            known = known[: random.integers(1, len(known) + 1)]
            num_tokens = BLOCK_TOKENS * len(known)
        num_tokens = min(num_tokens + _draw(random, GROWN_TOKENS), FIRST_TOKENS[-1])


def _draw(random: np.random.Generator, table: Sequence[float]) -> float:
    """Return a value whose quantiles are those of the table."""
    where = random.random()
    index = next(index for index, upper in enumerate(QUANTILES[1:]) if where <= upper)
    low, high = QUANTILES[index : index + 2]
    share = (where - low) / (high - low)
    return float(table[index] ** (1 - share) * table[index + 1] ** share)


def figures(requests: Sequence[Request]) -> dict[str, float]:
    """Return what a trace is compared by; a block is reused when it was in an earlier request."""
    seen: set[int] = set()
    depths = []
    for request in requests:
        depths.append(sum(block in seen for block in request.hash_ids))
        seen.update(request.hash_ids)
    num_blocks = sum(len(request.hash_ids) for request in requests)
    return {
        "requests": len(requests),
        "span_s": requests[-1].at_s - requests[0].at_s,
        "input_tokens": statistics.fmean(request.input_tokens for request in requests),
        "output_tokens": statistics.fmean(request.output_tokens for request in requests),
        "median_input_tokens": statistics.median(request.input_tokens for request in requests),
        "blocks": num_blocks,
        "distinct_blocks": len(seen),
        "reused": sum(depths) / num_blocks,
        "reuse_one_block_at_most": sum(depth <= 1 for depth in depths) / len(requests),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for name, value in figures(read(options.trace) if options.trace else generate(options.seed)).items():
        print(f"{name}: {value:.4g}" if value < 1 else f"{name}: {value:,.0f}")
