"""Which workers serve a sequence: pure decisions of the router."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import blake3

from headrace.errors import NotReady

FETCH_SHARE = 0.1
"""What fetching a token costs, in tokens computed: an upper end, so that a worker that has a prefix itself is preferred
while its queue is not longer. Moving takes 0.01 of computing here (23 kB at 5 GB/s against 0.35 ms) and about 0.1
where an 8B model computes 20,000 tokens a second and moves 128 kB each at 25 GB/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What the router knows of a worker at the moment of choosing.

    Attributes:
        prefers_prefill: Whether its role is to compute prompts.
        prefers_decode: Whether its role is to generate.
        num_sequences: Sequences it reported, running or waiting.
        waiting_tokens: Prompt tokens it reported as admitted and not yet computed.
        reserved_sequences: Sequences sent there since its last report.
        reserved_tokens: Prompt tokens sent there since its last report.
        free_share: Share of its blocks that are free or cached, 0 to 1.
    """

    name: str
    prefers_prefill: bool
    prefers_decode: bool
    num_sequences: int = 0
    waiting_tokens: int = 0
    reserved_sequences: int = 0
    reserved_tokens: int = 0
    free_share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteInput:
    """One decision's facts.

    Attributes:
        key: Breaks ties, so that equal workers share bursts; the sequence's id.
        num_tokens: Known tokens of the sequence.
        cached_tokens: Leading tokens each worker's own cache holds, by name.
        reachable_tokens: Leading tokens that any worker can fetch from a kvstore or another worker.
        excluded: Workers that have failed this sequence.
    """

    key: str
    num_tokens: int
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    reachable_tokens: int = 0
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A decision: who generates, and who computes the prompt if somebody else does."""

    decode: str
    prefill: str | None


def choose_route(workers: Iterable[WorkerView], facts: RouteInput) -> Route:
    """Choose the workers of a sequence.

    A worker whose role is decode generates and one whose role is prefill computes the prompt. When one
    role has nobody left, a worker of the other does both: every worker can.

    Raises:
        NotReady: no worker is left.
    """
    candidates = [worker for worker in workers if worker.name not in facts.excluded]
    if not candidates:
        raise NotReady("no worker is connected: wait for one or start one", retry_after_s=1.0)
    decoders = [worker for worker in candidates if worker.prefers_decode] or candidates
    decode = min(decoders, key=lambda worker: _decode_cost(worker, facts))
    prefill = choose_prefill(candidates, facts)
    if prefill is None or prefill == decode.name or decode.prefers_prefill or not decode.prefers_decode:
        return Route(decode=decode.name, prefill=None)
    return Route(decode=decode.name, prefill=prefill)


def choose_prefill(workers: Iterable[WorkerView], facts: RouteInput) -> str | None:
    """Choose who computes a prompt among workers of that role; None when there is nobody."""
    candidates = [worker for worker in workers if worker.prefers_prefill and worker.name not in facts.excluded]
    if not candidates:
        return None
    return min(candidates, key=lambda worker: _prefill_cost(worker, facts)).name


def _prefill_cost(worker: WorkerView, facts: RouteInput) -> tuple[float, bytes]:
    """Tokens to compute before this prompt is done there: what waits, and what it has neither here nor elsewhere."""
    own = facts.cached_tokens.get(worker.name, 0)
    fetched = max(0, facts.reachable_tokens - own)
    missing = facts.num_tokens - own - (1.0 - FETCH_SHARE) * fetched
    return worker.waiting_tokens + worker.reserved_tokens + missing, _tie(worker, facts)


def _decode_cost(worker: WorkerView, facts: RouteInput) -> tuple[float, bytes]:
    """Sequences that share its steps, weighed up as its blocks run out."""
    sequences = worker.num_sequences + worker.reserved_sequences
    missing_share = 1.0 - facts.cached_tokens.get(worker.name, 0) / max(1, facts.num_tokens)
    return (sequences + missing_share) / max(0.05, worker.free_share), _tie(worker, facts)


def _tie(worker: WorkerView, facts: RouteInput) -> bytes:
    """Rendezvous hash: equal workers are taken in an order that differs by sequence."""
    return blake3.blake3(f"{facts.key}\0{worker.name}".encode()).digest(8)


def retry_after_s(num_live: int, max_live: int, mean_request_s: float) -> float:
    """Return when one more request is likely to find room.

    Args:
        num_live: Requests admitted now.
        max_live: Most that may be.
        mean_request_s: Recent mean duration of a request.
    """
    excess = max(1, num_live - max_live + 1)
    return max(1.0, excess * mean_request_s / max(1, max_live))
