"""A peer that fails is left alone for growing, bounded pauses, and one caller at a time asks again."""

import pytest

from headrace.clock import VirtualClock
from headrace.core.step_back import StepBack

FIRST_S, LONGEST_S = 1.0, 5.0


@pytest.fixture
def clock():
    return VirtualClock(100.0)


@pytest.fixture
def step_back(clock):
    return StepBack(clock, FIRST_S, LONGEST_S)


def pause_s(step_back, clock):
    """Wait until somebody may ask and return how long that took, to an eighth of a second."""
    begun_s = clock.now()
    while not step_back.may_ask():
        clock.advance(0.125)
    return clock.now() - begun_s


def test_everybody_may_ask_while_all_is_well(step_back):
    assert all(step_back.may_ask() for _ in range(5))
    step_back.note_answer()
    assert step_back.may_ask()


def test_pauses_double_up_to_the_longest(step_back, clock):
    found = []
    for _ in range(5):
        step_back.note_failure()
        found.append(pause_s(step_back, clock))
    assert found == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_one_asks_for_all_after_a_pause(step_back, clock):
    step_back.note_failure()
    clock.advance(FIRST_S)
    assert [step_back.may_ask() for _ in range(4)] == [True, False, False, False]


def test_an_answer_ends_all_doubt_and_the_next_failure_begins_anew(step_back, clock):
    for _ in range(3):
        step_back.note_failure()
        pause_s(step_back, clock)
    step_back.note_answer()
    assert [step_back.may_ask() for _ in range(3)] == [True] * 3
    step_back.note_failure()
    assert pause_s(step_back, clock) == FIRST_S


def test_calls_that_fail_together_count_as_one_failure(step_back, clock):
    for _ in range(20):
        step_back.note_failure()
    assert pause_s(step_back, clock) == FIRST_S


def test_an_asker_that_left_without_a_word_does_not_silence_all(step_back, clock):
    step_back.note_failure()
    clock.advance(FIRST_S)
    assert step_back.may_ask()
    assert pause_s(step_back, clock) == FIRST_S
