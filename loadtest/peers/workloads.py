"""The requests of a comparison between servers: the same tokens for each of them."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FIRST_WORD_TOKEN = 1000
LAST_WORD_TOKEN = 40000
NUM_SHARING = 16
SHARED_TOKENS = 2048
OWN_TOKENS = 64
SHORT_ANSWER = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One greedy request for exactly `num_tokens` tokens."""

    prompt: list[int]
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests and who sends them.

    Attributes:
        name: As on the command line.
        users: Each sends its next request when its last one has ended.
        figure: What the ratio is taken of: a field of `drive.Figures`.
        draw: Makes the requests from random numbers.
        context_tokens: Longest prompt with its answer.
    """

    name: str
    users: int
    figure: str
    draw: Callable[[np.random.Generator], list[Ask]]
    context_tokens: int

    def asks(self, seed: int) -> list[Ask]:
        """Return the requests of a seed; no other seed and no other workload shares a prefix with them.

        Servers keep what they have computed, so a prompt that began like one of an earlier workload would be partly
        in their caches.
        """
        return self.draw(np.random.default_rng([zlib.crc32(self.name.encode()), seed]))


def _tokens(rng: np.random.Generator, count: int) -> list[int]:
    return [int(token) for token in rng.integers(FIRST_WORD_TOKEN, LAST_WORD_TOKEN, count)]


def _one(num_in: int, num_out: int) -> Callable[[np.random.Generator], list[Ask]]:
    return lambda rng: [Ask(prompt=_tokens(rng, num_in), num_tokens=num_out)]


def _mixed(count: int) -> Callable[[np.random.Generator], list[Ask]]:
    """Prompts lognormal(192, sigma 0.6) within 64 to 512, answers uniform from 64 to 128."""

    def draw(rng: np.random.Generator) -> list[Ask]:
        sizes = np.clip(rng.lognormal(np.log(192), 0.6, count), 64, 512).astype(int)
        answers = rng.integers(64, 129, count)
        return [
            Ask(prompt=_tokens(rng, size), num_tokens=int(answer)) for size, answer in zip(sizes, answers, strict=True)
        ]

    return draw


def _sharing(rng: np.random.Generator) -> list[Ask]:
    shared = _tokens(rng, SHARED_TOKENS)
    return [Ask(prompt=shared + _tokens(rng, OWN_TOKENS), num_tokens=SHORT_ANSWER) for _ in range(NUM_SHARING)]


def _not_sharing(rng: np.random.Generator) -> list[Ask]:
    size = SHARED_TOKENS + OWN_TOKENS
    return [Ask(prompt=_tokens(rng, size), num_tokens=SHORT_ANSWER) for _ in range(NUM_SHARING)]


WORKLOADS = {
    each.name: each
    for each in [
        Workload(name="W1", users=1, figure="tpot_p50_s", draw=_one(128, 128), context_tokens=256),
        Workload(name="W2@8", users=8, figure="s_per_token", draw=_mixed(16), context_tokens=640),
        Workload(name="W2@32", users=32, figure="s_per_token", draw=_mixed(64), context_tokens=640),
        *(
            Workload(
                name=f"W3:{size}", users=1, figure="ttft_p50_s", draw=_one(size, SHORT_ANSWER), context_tokens=size + 32
            )
            for size in (1024, 2048, 4096, 8000)
        ),
        Workload(name="W4:burst", users=NUM_SHARING, figure="total_s", draw=_sharing, context_tokens=2176),
        Workload(name="W4:sequence", users=1, figure="total_s", draw=_sharing, context_tokens=2176),
        Workload(name="W4:nothing-shared", users=NUM_SHARING, figure="total_s", draw=_not_sharing, context_tokens=2176),
    ]
}
