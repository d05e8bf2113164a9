"""Choosing workers is pure: the same facts give the same route."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import NotReady
from headrace.router.policy import RouteInput, WorkerView, choose_prefill, choose_route, retry_after_s


def decoder(name, **facts):
    return WorkerView(name=name, prefers_prefill=False, prefers_decode=True, **facts)


def prefiller(name, **facts):
    return WorkerView(name=name, prefers_prefill=True, prefers_decode=False, **facts)


def hybrid(name, **facts):
    return WorkerView(name=name, prefers_prefill=True, prefers_decode=True, **facts)


def facts(key="s", num_tokens=100, **more):
    return RouteInput(key=key, num_tokens=num_tokens, **more)


def test_decode_workers_generate_and_prefill_workers_compute_prompts():
    route = choose_route([prefiller("p"), decoder("d")], facts())
    assert (route.decode, route.prefill) == ("d", "p")


def test_a_hybrid_worker_does_both():
    route = choose_route([hybrid("h0", num_sequences=3), hybrid("h1")], facts())
    assert (route.decode, route.prefill) == ("h1", None)


def test_a_hybrid_worker_computes_prompts_for_a_decode_worker():
    route = choose_route([hybrid("h", num_sequences=5), decoder("d")], facts())
    assert (route.decode, route.prefill) == ("d", "h")


@pytest.mark.parametrize("load", ["num_sequences", "reserved_sequences"])
def test_the_worker_with_fewer_sequences_generates(load):
    workers = [decoder("busy", **{load: 3}), decoder("idle", **{load: 2})]
    assert {choose_route(workers, facts(str(key))).decode for key in range(20)} == {"idle"}


@pytest.mark.parametrize("load", ["waiting_tokens", "reserved_tokens"])
def test_the_worker_with_fewer_prompt_tokens_ahead_computes_the_prompt(load):
    workers = [prefiller("busy", **{load: 65}), prefiller("idle", **{load: 64})]
    assert {choose_prefill(workers, facts(str(key))) for key in range(20)} == {"idle"}


def test_a_cached_prefix_weighs_as_much_as_the_tokens_it_saves():
    workers = [prefiller("warm", waiting_tokens=50), prefiller("cold")]
    assert choose_prefill(workers, facts(cached_tokens={"warm": 64})) == "warm"
    assert choose_prefill(workers, facts(cached_tokens={"warm": 48})) == "cold"


def test_of_equally_loaded_decode_workers_the_one_that_holds_the_prefix_generates():
    workers = [decoder("cold"), decoder("warm")]
    assert {choose_route(workers, facts(str(key), cached_tokens={"warm": 96})).decode for key in range(20)} == {"warm"}


def test_a_worker_that_runs_out_of_blocks_counts_as_busier():
    workers = [decoder("full", num_sequences=2, free_share=0.1), decoder("roomy", num_sequences=4)]
    assert choose_route(workers, facts()).decode == "roomy"


def test_a_worker_that_failed_the_sequence_is_not_chosen_again():
    workers = [prefiller("p0"), prefiller("p1", waiting_tokens=9999), decoder("d0"), decoder("d1", num_sequences=99)]
    route = choose_route(workers, facts(excluded=frozenset({"p0", "d0"})))
    assert (route.decode, route.prefill) == ("d1", "p1")


def test_a_decode_worker_computes_the_prompt_when_no_prefill_worker_is_left():
    route = choose_route([prefiller("p"), decoder("d")], facts(excluded=frozenset({"p"})))
    assert (route.decode, route.prefill) == ("d", None)


def test_a_prefill_worker_generates_when_no_decode_worker_is_left():
    route = choose_route([prefiller("p0"), prefiller("p1")], facts())
    assert route.decode in ("p0", "p1")
    assert route.prefill is None


@pytest.mark.parametrize("excluded", [frozenset(), frozenset({"p", "d"})])
def test_nobody_left_is_not_ready_and_says_when_to_retry(excluded):
    workers = [prefiller("p"), decoder("d")] if excluded else []
    with pytest.raises(NotReady) as caught:
        choose_route(workers, facts(excluded=excluded))
    assert caught.value.retry_after_s


def burst(workers, count, cost):
    """Send equal requests, each charged at the moment of choosing, with no report in between."""
    views = {worker.name: worker for worker in workers}
    chosen = Counter()
    for index in range(count):
        route = choose_route(views.values(), facts(f"request-{index}"))
        chosen[route.decode] += 1
        view = views[route.decode]
        reserved = {"reserved_sequences": view.reserved_sequences + 1, "reserved_tokens": view.reserved_tokens + cost}
        views[route.decode] = replace(view, **reserved)
        if route.prefill is not None:
            chosen[route.prefill] += 1
            prefill = views[route.prefill]
            views[route.prefill] = replace(prefill, reserved_tokens=prefill.reserved_tokens + cost)
    return chosen


@pytest.mark.parametrize("num_workers", [2, 3, 7])
def test_a_burst_of_equal_requests_is_spread_evenly(num_workers):
    pairs = [prefiller(f"p{index}") for index in range(num_workers)] + [decoder(f"d{i}") for i in range(num_workers)]
    chosen = burst(pairs, 100, cost=100)
    mean = 100 / num_workers
    assert max(chosen.values()) / mean <= 1.0 + num_workers / 100


def test_even_without_charges_ties_are_broken_differently_for_each_request():
    """Router replicas do not see each other's charges: equal scores must not herd their bursts onto one worker."""
    workers = [decoder(f"d{index}") for index in range(4)]
    chosen = Counter(choose_route(workers, facts(f"request-{index}")).decode for index in range(400))
    assert max(chosen.values()) / 100 < 1.3


def test_a_tie_does_not_depend_on_the_order_of_the_workers():
    workers = [decoder(f"d{index}") for index in range(4)]
    for key in map(str, range(20)):
        assert choose_route(workers, facts(key)) == choose_route(reversed(workers), facts(key))


VIEWS = st.builds(
    WorkerView,
    name=st.sampled_from([f"w{index}" for index in range(5)]),
    prefers_prefill=st.booleans(),
    prefers_decode=st.just(value=True),
    num_sequences=st.integers(0, 50),
    waiting_tokens=st.integers(0, 10_000),
    reserved_sequences=st.integers(0, 50),
    free_share=st.floats(0, 1),
)


@given(st.lists(VIEWS, min_size=1, unique_by=lambda view: view.name), st.sets(st.sampled_from(["w0", "w1", "w2"])))
def test_a_route_names_known_workers_that_are_not_excluded_and_never_one_twice(views, excluded):
    allowed = {view.name for view in views} - excluded
    if not allowed:
        return
    route = choose_route(views, facts(excluded=frozenset(excluded)))
    assert route.decode in allowed
    assert route.prefill is None or (route.prefill in allowed and route.prefill != route.decode)


def test_the_time_to_retry_grows_with_the_excess_and_the_length_of_requests():
    assert retry_after_s(100, 100, 50.0) == 1.0
    assert retry_after_s(400, 100, 50.0) == pytest.approx(150.5)
    assert retry_after_s(400, 100, 100.0) == pytest.approx(301.0)


@given(st.integers(0, 10**6), st.integers(0, 10**4), st.floats(0, 1e4))
def test_the_time_to_retry_is_never_less_than_a_second(num_live, max_live, mean_s):
    assert retry_after_s(num_live, max_live, mean_s) >= 1.0


def test_a_prefix_that_everybody_can_fetch_sends_nobody_to_a_longer_queue():
    busy, idle = replace(prefiller("busy"), waiting_tokens=400), prefiller("idle")
    held = facts(num_tokens=1000, cached_tokens={"busy": 900})
    assert choose_prefill([busy, idle], held) == "busy"
    assert choose_prefill([busy, idle], replace(held, reachable_tokens=900)) == "idle"


def test_a_worker_that_has_a_prefix_itself_is_preferred_to_one_that_would_fetch_it():
    held = facts(num_tokens=1000, cached_tokens={"b": 900}, reachable_tokens=900)
    assert choose_prefill([prefiller("a"), prefiller("b")], held) == "b"
