import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.router.drift import HitDrift


def drift_of(*requests: tuple[int, int], alarm_at: float = 0.2) -> HitDrift:
    drift = HitDrift(alarm_at=alarm_at)
    for predicted, actual in requests:
        drift.note(predicted, actual)
    return drift


def test_an_index_that_is_right_does_not_drift():
    drift = drift_of(*[(2048, 2048)] * 10)
    assert (drift.share, drift.is_alarming) == (0.0, False)
    assert (drift.predicted_tokens, drift.actual_tokens) == (20480, 20480)


@pytest.mark.parametrize("request_", [(2048, 0), (0, 2048)])
def test_promised_and_unforeseen_hits_both_count(request_):
    drift = drift_of(request_)
    assert (drift.share, drift.is_alarming) == (1.0, True)


def test_a_few_tokens_are_no_alarm():
    assert not drift_of((16, 0)).is_alarming


def test_nothing_cached_and_nothing_promised_is_no_drift():
    assert drift_of(*[(0, 0)] * 100).share == 0.0


def test_what_was_declined_is_neither_promised_nor_missing():
    drift = drift_of()
    drift.note(4096, 1024, 3072)
    assert (drift.share, drift.is_alarming) == (0.0, False)
    assert (drift.predicted_tokens, drift.actual_tokens) == (1024, 1024)


def test_what_is_missing_beside_what_was_declined_is_drift():
    drift = drift_of()
    drift.note(4096, 0, 2048)
    assert (drift.share, drift.is_alarming) == (1.0, True)


def test_declining_what_nobody_promised_hides_no_unforeseen_hit():
    drift = drift_of()
    drift.note(1024, 4096, 2048)
    assert drift.share == 0.75


def test_old_mistakes_are_forgotten():
    drift = drift_of((4096, 0), *[(4096, 4096)] * 300)
    assert drift.share < 0.01


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=50))
def test_drift_is_a_share(requests):
    assert 0.0 <= drift_of(*requests).share <= 1.0
