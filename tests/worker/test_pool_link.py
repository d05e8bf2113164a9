"""When a process that owns a pool is left alone."""

import pytest

from headrace.clock import VirtualClock
from headrace.errors import DeadlineExceeded, Draining
from headrace.worker.pool_link import HASTY_S, RETRY_S, LinkParts, PoolLink


@pytest.fixture
def clock():
    return VirtualClock(100.0)


@pytest.fixture
def link(clock):
    return PoolLink("127.0.0.1:1", LinkParts(channels=None, connector=None, peers=None, caller=None, clock=clock))


async def fail(link, clock, waited_s, error):
    async def work():
        clock.advance(waited_s)
        raise error

    assert await link.attempt("read", work, "otherwise") == "otherwise"


async def test_one_that_kept_a_patient_caller_waiting_rests(link, clock):
    await fail(link, clock, 2 * HASTY_S, DeadlineExceeded("late"))
    assert link.is_resting
    clock.advance(RETRY_S)
    assert not link.is_resting


async def test_one_that_was_late_for_an_impatient_caller_is_asked_again(link, clock):
    await fail(link, clock, HASTY_S / 2, DeadlineExceeded("late"))
    assert not link.is_resting
    assert link.num_failures == 1


async def test_one_that_refuses_at_once_rests(link, clock):
    await fail(link, clock, 0.0, Draining("leaving"))
    assert link.is_resting
