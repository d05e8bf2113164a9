"""Attempts are made by error class, with growing pauses, within the deadline."""

import pytest

from headrace.client.attempts import Attempts, CallPolicy
from headrace.clock import VirtualClock
from headrace.errors import (
    BlockLost,
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    Overloaded,
    PeerFailed,
    PeerMismatch,
    Saturated,
)


@pytest.fixture
def clock():
    return VirtualClock()


def attempts(clock, timeout_s=None, retries=10, jitter=0.0, patience_s=None):
    policy = CallPolicy(timeout_s=100.0, retries=retries, clock=clock, jitter=lambda: jitter)
    return Attempts(policy, timeout_s, patience_s)


def test_pauses_double_up_to_a_bound(clock):
    tries = attempts(clock)
    pauses = [tries.pause_s(NotReady("x")) for _ in range(8)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_whoever_has_a_time_tries_often_in_it_and_no_longer(clock):
    tries, pauses = attempts(clock, retries=1, patience_s=3.0), []
    while clock.now() < 3.0:
        pauses.append(tries.pause_s(NotReady("x")))
        clock.advance(pauses[-1])
    with pytest.raises(NotReady):
        tries.pause_s(NotReady("x"))
    assert pauses[:4] == pytest.approx([0.1, 0.2, 0.3, 0.3])


def test_a_longer_wait_that_the_server_asks_for_is_honoured(clock):
    assert attempts(clock).pause_s(Saturated("x", retry_after_s=7.0)) == 7.0


def test_jitter_lengthens_a_pause_by_at_most_half(clock):
    assert attempts(clock, jitter=0.999).pause_s(Saturated("x", retry_after_s=2.0)) == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize(
    "error", [InvalidRequest("x"), DeadlineExceeded("x"), PeerMismatch("x"), Overloaded("x"), BlockLost("x")]
)
def test_errors_that_a_retry_cannot_help_are_raised(clock, error):
    with pytest.raises(type(error)):
        attempts(clock).pause_s(error)


@pytest.mark.parametrize("error", [Saturated("x"), NotReady("x"), PeerFailed("x"), Overloaded("x", retry_after_s=0.1)])
def test_errors_that_pass_are_tried_again(clock, error):
    assert attempts(clock).pause_s(error) > 0


def test_attempts_are_used_up(clock):
    tries = attempts(clock, retries=1)
    tries.pause_s(Saturated("x"))
    with pytest.raises(Saturated):
        tries.pause_s(Saturated("x"))


def test_all_attempts_share_one_deadline(clock):
    tries = attempts(clock, timeout_s=10.0)
    clock.advance(9.0)
    assert tries.remaining_s() == pytest.approx(1.0)
    with pytest.raises(Saturated):
        tries.pause_s(Saturated("x", retry_after_s=2.0))
    clock.advance(1.0)
    with pytest.raises(DeadlineExceeded):
        tries.remaining_s()


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_a_timeout_must_be_above_zero(clock, timeout_s):
    with pytest.raises(InvalidRequest) as caught:
        attempts(clock, timeout_s=timeout_s)
    assert caught.value.field == "timeout_s"
