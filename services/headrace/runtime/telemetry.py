"""Metrics: the one place that names them. Nothing is registered globally; a registry is passed in.

Names are `headrace_<role>_<noun>_<unit>`; what a process reports of itself is `headrace_worker_…` with the
labels `worker` and `role`. Boards and autoscalers made for vLLM find the core ones again as `vllm:…`.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from headrace.clock import Clock
from headrace.core.request import Piece
from headrace.v1 import cluster_pb2

TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
DURATION_BUCKETS_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)

_Reading: TypeAlias = Callable[[cluster_pb2.LoadReport], float]

_WORKER_GAUGES: dict[str, tuple[str, _Reading]] = {
    "running_sequences": ("Sequences in the running batch.", lambda load: load.num_running),
    "waiting_sequences": ("Sequences waiting for blocks or a first step.", lambda load: load.num_waiting),
    "waiting_tokens": ("Prompt tokens admitted and not yet computed.", lambda load: load.waiting_tokens),
    "total_blocks": ("Blocks in the pool: free + cached + leased.", lambda load: load.ledger.total),
    "free_blocks": ("Blocks with nothing in them.", lambda load: load.ledger.free),
    "cached_blocks": ("Blocks that a prefix may find again.", lambda load: load.ledger.cached),
    "leased_blocks": ("Blocks held by a lease or a writer in flight.", lambda load: load.ledger.leased),
    "leases": ("Live leases.", lambda load: load.ledger.num_leases),
    "inflight_transfers": ("Transfers posted and not settled.", lambda load: load.num_transfers),
    "tasks": ("Live asyncio tasks.", lambda load: load.num_tasks),
    "open_fds": ("Open file descriptors.", lambda load: load.num_fds),
    "ready": ("1 when the process has lately proven its path.", lambda load: load.is_ready),
}
_COST_GAUGES: dict[str, tuple[str, _Reading]] = {
    "step_cost_seconds": ("Cost of any step, measured at the start.", lambda load: load.cost.step_s),
    "prompt_step_cost_seconds": ("Cost that prompt tokens add to a step.", lambda load: load.cost.prompt_s),
    "prompt_token_cost_seconds": ("Cost per prompt token.", lambda load: load.cost.token_s),
    "prompt_pair_cost_seconds": ("Cost per token that a prompt token attends to.", lambda load: load.cost.pair_s),
    "decode_cost_seconds": ("Cost per decoding sequence.", lambda load: load.cost.decode_s),
    "context_token_cost_seconds": ("Cost per token that a decode attends to.", lambda load: load.cost.context_s),
    "wide_cost_rows": ("Rows from which on steps cost the following; 0 if none do.", lambda load: load.cost.wide_from),
    "wide_prompt_step_cost_seconds": ("Cost that prompt tokens add to it.", lambda load: load.cost.wide_prompt_s),
    "wide_prompt_token_cost_seconds": ("Cost per prompt token of it.", lambda load: load.cost.wide_token_s),
    "wide_prompt_pair_cost_seconds": ("Cost per pair of it.", lambda load: load.cost.wide_pair_s),
    "cost_r2": ("Share of the measured variance that the costs explain.", lambda load: load.cost.r2),
}
_WORKER_COUNTERS: dict[str, tuple[str, _Reading]] = {
    "steps": ("Steps of the engine.", lambda load: load.num_steps),
    "preemptions": ("Sequences preempted.", lambda load: load.num_preemptions),
    "computed_tokens": ("Tokens computed, not reused.", lambda load: load.computed_tokens),
    "transferred_bytes": ("Bytes moved by transfers.", lambda load: load.transferred_bytes),
}
_REUSE_COUNTERS: dict[str, tuple[str, _Reading]] = {
    "reuse_local_tokens": ("Prompt tokens found in the own cache.", lambda load: load.reuse.local_tokens),
    "reuse_peer_tokens": ("Prompt tokens read from other workers.", lambda load: load.reuse.peer_tokens),
    "reuse_dram_tokens": ("Prompt tokens read from memory of kvstores.", lambda load: load.reuse.dram_tokens),
    "reuse_disk_tokens": ("Prompt tokens read from disk of kvstores.", lambda load: load.reuse.disk_tokens),
    "reuse_declined_tokens": (
        "Prompt tokens held elsewhere and computed, for that was expected to be faster.",
        lambda load: load.reuse.declined_tokens,
    ),
    "reuse_regretted": ("Fetches that took longer than computing.", lambda load: load.reuse.num_regretted),
    "reuse_regretted_seconds": ("Seconds by which they did.", lambda load: load.reuse.regretted_s),
    "reuse_corrupt_blocks": (
        "Fetched blocks whose bytes differed from their digest.",
        lambda load: load.reuse.num_corrupt_blocks,
    ),
    "reuse_stored_blocks": ("Blocks put into kvstores.", lambda load: load.reuse.num_stored_blocks),
    "reuse_dropped_blocks": (
        "Blocks not put because too many waited.",
        lambda load: load.reuse.num_dropped_blocks,
    ),
}
_STORE_GAUGES: dict[str, tuple[str, _Reading]] = {
    "store_dram_bytes": ("Blocks in memory that can be found.", lambda load: load.store.dram_bytes),
    "store_disk_bytes": ("Blocks on disk.", lambda load: load.store.disk_bytes),
    "store_disk_capacity_bytes": ("Most blocks on disk; 0 without one.", lambda load: load.store.disk_capacity_bytes),
}
_STORE_COUNTERS: dict[str, tuple[str, _Reading]] = {
    "store_asked_blocks": ("Blocks asked for.", lambda load: load.store.num_asked_blocks),
    "store_hit_blocks": ("Of them, found.", lambda load: load.store.num_hit_blocks),
    "store_disk_hit_blocks": ("Blocks brought from disk to memory.", lambda load: load.store.num_disk_hit_blocks),
    "store_evicted_blocks": ("Blocks forgotten in memory.", lambda load: load.store.num_evicted_blocks),
    "store_disk_evicted_blocks": ("Blocks forgotten on disk.", lambda load: load.store.num_disk_evicted_blocks),
    "store_disk_written_blocks": ("Blocks written to disk.", lambda load: load.store.num_disk_written_blocks),
    "store_disk_failed_blocks": ("Blocks the disk refused or damaged.", lambda load: load.store.num_disk_failed_blocks),
    "store_quarantined_blocks": ("Blocks whose bytes were wrong.", lambda load: load.store.num_quarantined_blocks),
    "store_forged_blocks": ("Blocks asked for by another tenant.", lambda load: load.store.num_forged_blocks),
    "store_over_quota_puts": ("Puts that a tenant's quota cut.", lambda load: load.store.num_over_quota_puts),
    "store_handed_blocks": ("Blocks handed to siblings.", lambda load: load.store.num_handed_blocks),
}
_INGEST_GAUGES: dict[str, tuple[str, _Reading]] = {
    "ingest_text_chars": ("Characters of contexts kept now.", lambda load: load.ingest.text_chars),
    "ingest_kept": ("Contexts that have ended and are still told of.", lambda load: load.ingest.num_kept),
}
_INGEST_COUNTERS: dict[str, tuple[str, _Reading]] = {
    "ingest_opened": ("Contexts opened.", lambda load: load.ingest.num_opened),
    "ingest_resumed": ("Calls that took a context up again.", lambda load: load.ingest.num_resumed),
    "ingest_expired": ("Contexts given up for want of a client or of text.", lambda load: load.ingest.num_expired),
    "ingest_operations": ("Operations on contexts.", lambda load: load.ingest.num_operations),
    "ingest_refused": ("Of them, refused.", lambda load: load.ingest.num_refused),
    "ingest_revisions": ("Revisions sent to routers.", lambda load: load.ingest.num_revisions),
    "ingest_sent_tokens": ("Tokens sent to routers.", lambda load: load.ingest.sent_tokens),
    "ingest_dropped_tokens": ("Of them, taken back later.", lambda load: load.ingest.dropped_tokens),
}
_VLLM_GAUGES: dict[str, tuple[str, _Reading]] = {
    "vllm:num_requests_running": ("Sequences in the running batch.", lambda load: load.num_running),
    "vllm:num_requests_waiting": ("Sequences waiting.", lambda load: load.num_waiting),
    "vllm:kv_cache_usage_perc": ("Share of blocks in use, 0 to 1.", lambda load: _usage(load.ledger)),
}


class RouterMetrics:
    """What a router counts of its requests.

    Args:
        registry: Where the metrics live.
        clock: Measures times.
    """

    def __init__(self, registry: CollectorRegistry, clock: Clock) -> None:
        self.clock = clock
        self.live = Gauge("headrace_router_live_requests", "Requests admitted and not ended.", registry=registry)
        self.requests = Counter("headrace_router_requests", "Requests by outcome.", ["outcome"], registry=registry)
        self.ttft = Histogram(
            "headrace_router_time_to_first_token_seconds",
            "From admission to the first token.",
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.itl = Histogram(
            "headrace_router_inter_token_latency_seconds",
            "Gap between tokens of one answer.",
            buckets=ITL_BUCKETS_S,
            registry=registry,
        )
        self.duration = Histogram(
            "headrace_router_request_duration_seconds",
            "From admission to the end.",
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self.prompt_tokens = Counter("headrace_router_prompt_tokens", "Tokens of prompts answered.", registry=registry)
        self.generation_tokens = Counter("headrace_router_generation_tokens", "Tokens generated.", registry=registry)
        self.cached_tokens = Counter("headrace_router_cached_tokens", "Prompt tokens reused.", registry=registry)

    def begin(self) -> "RequestMeter":
        """Count a request that was admitted; its `end` must be called once."""
        self.live.inc()
        return RequestMeter(self)

    def refuse(self, outcome: str) -> None:
        """Count a request that was not admitted.

        Args:
            outcome: Code of the error it got.
        """
        self.requests.labels(outcome=outcome).inc()


class RequestMeter:
    """Measures one request."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        self._begun_s = metrics.clock.now()
        self._has_tokens = False
        self._last_s: dict[int, float] = {}

    def piece(self, piece: Piece) -> None:
        """Count a piece that goes to the client."""
        if piece.usage is not None:
            self._metrics.prompt_tokens.inc(piece.usage.prompt_tokens)
            self._metrics.cached_tokens.inc(piece.usage.cached_tokens)
        num_tokens = len(piece.tokens)
        if not num_tokens:
            return
        now_s = self._metrics.clock.now()
        self._metrics.generation_tokens.inc(num_tokens)
        if not self._has_tokens:
            self._has_tokens = True
            self._metrics.ttft.observe(now_s - self._begun_s)
        if piece.choice in self._last_s:
            # Tokens that arrive together share the gap before them: a mean over gaps stays a mean over tokens.
            gap_s = (now_s - self._last_s[piece.choice]) / num_tokens
            for _ in range(num_tokens):
                self._metrics.itl.observe(gap_s)
        self._last_s[piece.choice] = now_s

    def end(self, outcome: str) -> None:
        """Count the end.

        Args:
            outcome: "ok", "cancelled", or the code of an error.
        """
        self._metrics.live.dec()
        self._metrics.requests.labels(outcome=outcome).inc()
        self._metrics.duration.observe(self._metrics.clock.now() - self._begun_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberLoad:
    """The last report of a process.

    Attributes:
        role: For example "decode".
        load: What it reported.
    """

    role: str
    load: cluster_pb2.LoadReport


class ClusterCollector(Collector):
    """Shows the last load report of every process, read at the moment of a scrape.

    Args:
        members: Returns the reports.
        model_name: Returns the name of the served model, for the vLLM names.
    """

    def __init__(self, members: Callable[[], Iterable[MemberLoad]], model_name: Callable[[], str]) -> None:
        self._members = members
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """Yield one family per reading."""
        members, labels = tuple(self._members()), ["worker", "role"]
        measured = tuple(member for member in members if member.load.HasField("cost"))
        stores = tuple(member for member in members if member.load.HasField("store"))
        ingestors = tuple(member for member in members if member.load.HasField("ingest"))
        shown_gauges = (
            (_WORKER_GAUGES, members),
            (_COST_GAUGES, measured),
            (_STORE_GAUGES, stores),
            (_INGEST_GAUGES, ingestors),
        )
        for gauges, shown in shown_gauges:
            for name, (text, read) in gauges.items():
                gauge = GaugeMetricFamily(f"headrace_worker_{name}", text, labels=labels)
                for member in shown:
                    gauge.add_metric([member.load.name, member.role], read(member.load))
                yield gauge
        reusing = tuple(member for member in members if member.load.HasField("reuse"))
        counted = (
            (_WORKER_COUNTERS, members),
            (_REUSE_COUNTERS, reusing),
            (_STORE_COUNTERS, stores),
            (_INGEST_COUNTERS, ingestors),
        )
        for counters, shown in counted:
            for name, (text, read) in counters.items():
                counter = CounterMetricFamily(f"headrace_worker_{name}", text, labels=labels)
                for member in shown:
                    counter.add_metric([member.load.name, member.role], read(member.load))
                yield counter
        engines = [member.load for member in members if member.role not in ("kvstore", "ingestor")]
        for name, (text, read) in _VLLM_GAUGES.items():
            alias = GaugeMetricFamily(name, text, labels=["model_name", "engine"])
            for load in engines:
                alias.add_metric([self._model_name(), load.name], read(load))
            yield alias


class VllmView(Collector):
    """Shows the router's request metrics again under the names that vLLM gives them.

    Args:
        metrics: What is shown.
        model_name: Returns the name of the served model.
    """

    def __init__(self, metrics: RouterMetrics, model_name: Callable[[], str]) -> None:
        self._model_name = model_name
        self._sources: dict[str, Collector] = {
            "vllm:time_to_first_token_seconds": metrics.ttft,
            "vllm:inter_token_latency_seconds": metrics.itl,
            "vllm:e2e_request_latency_seconds": metrics.duration,
            "vllm:prompt_tokens": metrics.prompt_tokens,
            "vllm:generation_tokens": metrics.generation_tokens,
        }

    def collect(self) -> Iterator[Metric]:
        """Yield each source under its other name."""
        for name, source in self._sources.items():
            for metric in source.collect():
                view = Metric(name, metric.documentation, metric.type)
                for sample in metric.samples:
                    labels = {**sample.labels, "model_name": self._model_name()}
                    view.add_sample(name + sample.name.removeprefix(metric.name), labels, sample.value)
                yield view


def exposition(registry: CollectorRegistry) -> bytes:
    """Return all metrics as Prometheus text."""
    return generate_latest(registry)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopLag:
    """How late an event loop was, in seconds, over the samples kept."""

    max_s: float = 0.0
    p99_s: float = 0.0
    num_samples: int = 0


class LoopLagProbe:
    """Measures how much later than asked a sleeping task wakes up.

    Args:
        interval_s: Time between two samples.
        num_kept: Samples over which `lag` is taken; the default keeps the last minute.
    """

    def __init__(self, interval_s: float = 0.25, num_kept: int = 240) -> None:
        self._interval_s = interval_s
        self._samples: deque[float] = deque(maxlen=num_kept)

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + self._interval_s
            await asyncio.sleep(self._interval_s)
            self._samples.append(max(0.0, loop.time() - due_s))

    def lag(self) -> LoopLag:
        """Return the lag over the samples kept."""
        ordered = sorted(self._samples)
        if not ordered:
            return LoopLag()
        p99_s = ordered[math.ceil(0.99 * len(ordered)) - 1]
        return LoopLag(max_s=ordered[-1], p99_s=p99_s, num_samples=len(ordered))

    def reset(self) -> None:
        """Forget the samples."""
        self._samples.clear()

    def publish(self, registry: CollectorRegistry, role: str) -> None:
        """Show the longest lag of the samples kept as a gauge."""
        gauge = Gauge(f"headrace_{role}_loop_lag_seconds", "Longest lag of the event loop lately.", registry=registry)
        gauge.set_function(lambda: self.lag().max_s)


def _usage(ledger: cluster_pb2.LedgerReport) -> float:
    return ledger.leased / ledger.total if ledger.total else 0.0
