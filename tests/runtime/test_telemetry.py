"""Metrics say what happened, under names that boards know."""

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from headrace.clock import VirtualClock
from headrace.core.request import Piece, Token, Usage
from headrace.runtime.telemetry import (
    ClusterCollector,
    LoopLag,
    LoopLagProbe,
    MemberLoad,
    RouterMetrics,
    VllmView,
    exposition,
)
from headrace.v1 import cluster_pb2


def piece(num_tokens, choice=0, usage=None):
    tokens = tuple(Token(cursor=index, token_id=1) for index in range(num_tokens))
    return Piece(choice=choice, text="x", tokens=tokens, usage=usage)


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def clock():
    return VirtualClock()


@pytest.fixture
def metrics(registry, clock):
    return RouterMetrics(registry, clock)


def value(registry, name, **labels):
    return registry.get_sample_value(name, labels)


def test_the_first_token_of_a_request_is_timed_once(registry, metrics, clock):
    meter = metrics.begin()
    clock.advance(0.5)
    meter.piece(piece(0))
    clock.advance(0.5)
    meter.piece(piece(1))
    meter.piece(piece(1, choice=1))
    assert value(registry, "headrace_router_time_to_first_token_seconds_sum") == 1.0
    assert value(registry, "headrace_router_time_to_first_token_seconds_count") == 1


def test_tokens_that_arrive_together_share_the_gap_before_them(registry, metrics, clock):
    meter = metrics.begin()
    meter.piece(piece(1))
    clock.advance(0.3)
    meter.piece(piece(3))
    assert value(registry, "headrace_router_inter_token_latency_seconds_count") == 3
    assert value(registry, "headrace_router_inter_token_latency_seconds_sum") == pytest.approx(0.3)


def test_gaps_are_between_tokens_of_one_answer(registry, metrics, clock):
    meter = metrics.begin()
    meter.piece(piece(1, choice=0))
    clock.advance(1)
    meter.piece(piece(1, choice=1))
    assert value(registry, "headrace_router_inter_token_latency_seconds_count") == 0


def test_the_end_of_a_request_is_counted_by_its_outcome(registry, metrics, clock):
    meter = metrics.begin()
    assert value(registry, "headrace_router_live_requests") == 1
    clock.advance(2)
    meter.end("saturated")
    metrics.refuse("saturated")
    assert value(registry, "headrace_router_live_requests") == 0
    assert value(registry, "headrace_router_requests_total", outcome="saturated") == 2
    assert value(registry, "headrace_router_request_duration_seconds_sum") == 2


def test_tokens_are_counted_as_they_go_and_the_prompt_with_the_usage(registry, metrics):
    meter = metrics.begin()
    meter.piece(piece(2))
    assert value(registry, "headrace_router_generation_tokens_total") == 2
    meter.piece(piece(1, usage=Usage(prompt_tokens=10, completion_tokens=3, cached_tokens=4)))
    assert value(registry, "headrace_router_prompt_tokens_total") == 10
    assert value(registry, "headrace_router_cached_tokens_total") == 4
    assert value(registry, "headrace_router_generation_tokens_total") == 3


def test_request_metrics_are_seen_under_the_names_of_vllm_too(registry, metrics, clock):
    registry.register(VllmView(metrics, lambda: "tiny"))
    meter = metrics.begin()
    clock.advance(0.05)
    meter.piece(piece(2, usage=Usage(prompt_tokens=10, completion_tokens=2, cached_tokens=0)))
    for name in ("time_to_first_token_seconds_count", "time_to_first_token_seconds_sum", "prompt_tokens_total"):
        ours = value(registry, f"headrace_router_{name}")
        assert ours
        assert value(registry, f"vllm:{name}", model_name="tiny") == ours
    bucket = value(registry, "vllm:time_to_first_token_seconds_bucket", model_name="tiny", le="0.06")
    assert bucket == 1
    assert value(registry, "vllm:generation_tokens_total", model_name="tiny") == 2


def test_the_ledger_of_every_process_is_shown(registry):
    ledger = cluster_pb2.LedgerReport(total=10, free=5, cached=3, leased=2, num_leases=1)
    report = cluster_pb2.LoadReport(name="decode-0", num_running=4, num_waiting=1, num_steps=7, ledger=ledger)
    members = [MemberLoad(role="decode", load=report)]
    registry.register(ClusterCollector(lambda: members, lambda: "tiny"))
    labels = {"worker": "decode-0", "role": "decode"}
    shares = [value(registry, f"headrace_worker_{kind}_blocks", **labels) for kind in ("free", "cached", "leased")]
    assert sum(shares) == value(registry, "headrace_worker_total_blocks", **labels) == 10
    assert value(registry, "headrace_worker_steps_total", **labels) == 7
    assert value(registry, "vllm:num_requests_running", model_name="tiny", engine="decode-0") == 4
    assert value(registry, "vllm:num_requests_waiting", model_name="tiny", engine="decode-0") == 1
    assert value(registry, "vllm:kv_cache_usage_perc", model_name="tiny", engine="decode-0") == 0.2


def test_what_steps_cost_is_shown_of_those_who_measured_it(registry):
    cost = cluster_pb2.StepCost(
        step_s=1e-2, prompt_s=2e-2, token_s=3e-3, pair_s=4e-7, decode_s=5e-3, context_s=6e-6, r2=0.97
    )
    members = [
        MemberLoad(role="decode", load=cluster_pb2.LoadReport(name="decode-0", cost=cost)),
        MemberLoad(role="kvstore", load=cluster_pb2.LoadReport(name="kvstore")),
    ]
    registry.register(ClusterCollector(lambda: members, lambda: "tiny"))
    shown = {
        "step_cost_seconds": 1e-2,
        "prompt_step_cost_seconds": 2e-2,
        "prompt_token_cost_seconds": 3e-3,
        "prompt_pair_cost_seconds": 4e-7,
        "decode_cost_seconds": 5e-3,
        "context_token_cost_seconds": 6e-6,
        "cost_r2": 0.97,
    }
    for name, expected in shown.items():
        assert value(registry, f"headrace_worker_{name}", worker="decode-0", role="decode") == expected
        assert value(registry, f"headrace_worker_{name}", worker="kvstore", role="kvstore") is None


def test_what_prompts_found_is_shown_of_workers(registry):
    reuse = cluster_pb2.ReuseReport(
        local_tokens=1,
        peer_tokens=2,
        dram_tokens=3,
        disk_tokens=4,
        declined_tokens=5,
        num_regretted=6,
        regretted_s=0.7,
        num_corrupt_blocks=8,
        num_stored_blocks=9,
        num_dropped_blocks=10,
    )
    members = [
        MemberLoad(role="prefill", load=cluster_pb2.LoadReport(name="p0", reuse=reuse)),
        MemberLoad(role="kvstore", load=cluster_pb2.LoadReport(name="kvstore")),
    ]
    registry.register(ClusterCollector(lambda: members, lambda: "tiny"))
    nouns = (
        "local_tokens peer_tokens dram_tokens disk_tokens declined_tokens regretted regretted_seconds "
        "corrupt_blocks stored_blocks dropped_blocks"
    )
    shown = [
        value(registry, f"headrace_worker_reuse_{noun}_total", worker="p0", role="prefill") for noun in nouns.split()
    ]
    assert shown == [1, 2, 3, 4, 5, 6, 0.7, 8, 9, 10]
    assert value(registry, "headrace_worker_reuse_local_tokens_total", worker="kvstore", role="kvstore") is None


def test_the_kvstore_has_a_ledger_and_no_running_requests(registry):
    members = [MemberLoad(role="kvstore", load=cluster_pb2.LoadReport(name="kvstore"))]
    registry.register(ClusterCollector(lambda: members, lambda: "tiny"))
    assert value(registry, "headrace_worker_total_blocks", worker="kvstore", role="kvstore") == 0
    assert value(registry, "vllm:num_requests_running", model_name="tiny", engine="kvstore") is None


def test_what_ingestors_took_in_is_shown_of_them_alone(registry):
    ingest = cluster_pb2.IngestReport(
        text_chars=1,
        num_opened=2,
        num_operations=3,
        num_refused=4,
        num_revisions=5,
        sent_tokens=6,
        dropped_tokens=7,
        num_resumed=8,
        num_expired=9,
        num_kept=10,
    )
    report = cluster_pb2.LoadReport(name="ingestor", num_running=11, num_waiting=12, ingest=ingest)
    members = [
        MemberLoad(role="ingestor", load=report),
        MemberLoad(role="decode", load=cluster_pb2.LoadReport(name="d0")),
    ]
    registry.register(ClusterCollector(lambda: members, lambda: "tiny"))
    labels = {"worker": "ingestor", "role": "ingestor"}
    shown = {
        name: value(registry, f"headrace_worker_{name}", **labels)
        for name in (
            "ingest_text_chars ingest_opened_total ingest_operations_total ingest_refused_total ingest_revisions_total "
            "ingest_sent_tokens_total ingest_dropped_tokens_total ingest_resumed_total ingest_expired_total "
            "ingest_kept running_sequences waiting_sequences"
        ).split()
    }
    assert list(shown.values()) == list(range(1, 13))
    assert value(registry, "headrace_worker_ingest_text_chars", worker="d0", role="decode") is None
    assert value(registry, "headrace_worker_ingest_opened_total", worker="d0", role="decode") is None


def test_an_ingestor_is_no_engine_of_the_boards(registry):
    members = [MemberLoad(role="ingestor", load=cluster_pb2.LoadReport(name="ingestor", num_running=3))]
    registry.register(ClusterCollector(lambda: members, lambda: "tiny"))
    assert value(registry, "vllm:num_requests_running", model_name="tiny", engine="ingestor") is None


def test_the_text_is_what_prometheus_parses(registry, metrics, clock):
    registry.register(VllmView(metrics, lambda: "tiny"))
    registry.register(ClusterCollector(lambda: [], lambda: "tiny"))
    metrics.begin().end("ok")
    names = {family.name for family in text_string_to_metric_families(exposition(registry).decode())}
    assert {"headrace_router_requests", "vllm:time_to_first_token_seconds", "headrace_worker_free_blocks"} <= names


async def test_the_probe_sees_a_blocked_loop(registry):
    probe = LoopLagProbe(interval_s=0.001)
    probe.publish(registry, "router")
    assert probe.lag() == LoopLag()
    running = asyncio.ensure_future(probe.run())
    await asyncio.sleep(0.01)
    time.sleep(0.1)  # noqa: ASYNC251 blocking the loop is what is measured
    await asyncio.sleep(0.01)
    running.cancel()
    lag = probe.lag()
    assert 0.09 < lag.max_s < 5
    assert lag.p99_s <= lag.max_s
    assert value(registry, "headrace_router_loop_lag_seconds") == lag.max_s
    probe.reset()
    assert probe.lag().num_samples == 0
