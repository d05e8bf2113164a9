"""What goes at a pace never exceeds its rate by more than one burst, and nobody waits longer than that takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.pace import Pace

RATE, BURST = 1000.0, 500.0


def test_a_burst_goes_at_once_and_what_follows_at_the_rate():
    pace = Pace(RATE, BURST, 10.0)
    assert pace.delay_s(500, 10.0) == 0.0
    assert pace.delay_s(250, 10.0) == pytest.approx(0.25)
    assert pace.delay_s(250, 10.0) == pytest.approx(0.5)


def test_a_piece_larger_than_the_burst_goes_when_it_is_paid_for():
    pace = Pace(RATE, BURST, 0.0)
    assert pace.delay_s(2500, 0.0) == pytest.approx(2.0)
    assert pace.delay_s(0, 2.0) == 0.0


def test_a_rest_saves_no_more_than_one_burst():
    pace = Pace(RATE, BURST, 0.0)
    pace.delay_s(500, 0.0)
    assert pace.delay_s(600, 1e6) == pytest.approx(0.1)


def test_a_time_that_runs_backwards_gives_nothing():
    pace = Pace(RATE, BURST, 10.0)
    pace.delay_s(500, 10.0)
    assert pace.delay_s(100, 5.0) == pytest.approx(0.1)
    assert pace.delay_s(0, 10.1) == pytest.approx(0.0, abs=1e-9)


def test_another_rate_holds_from_its_change_on():
    pace = Pace(RATE, BURST, 0.0)
    pace.delay_s(1500, 0.0)
    pace.set_rate(2 * RATE, 0.5)
    assert pace.delay_s(0, 0.5) == pytest.approx(0.25)


pieces = st.lists(st.tuples(st.integers(0, 5000), st.floats(0.0, 3.0)), min_size=1, max_size=30)


@given(pieces)
def test_no_more_begins_than_one_burst_and_the_rate_allow(taken):
    pace, now_s, total = Pace(RATE, BURST, 0.0), 0.0, 0
    for num_bytes, pause_s in taken:
        now_s += pause_s
        begins_s = now_s + pace.delay_s(num_bytes, now_s)
        total += num_bytes
        assert total <= (BURST + RATE * begins_s) * (1 + 1e-9)


@given(pieces)
def test_who_keeps_to_the_delays_never_waits_for_more_than_its_own_piece(taken):
    pace, now_s = Pace(RATE, BURST, 0.0), 0.0
    for num_bytes, pause_s in taken:
        delay_s = pace.delay_s(num_bytes, now_s)
        assert 0.0 <= delay_s <= num_bytes / RATE + 1e-9
        now_s += delay_s + pause_s
