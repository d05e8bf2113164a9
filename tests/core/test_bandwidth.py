"""A lane's speed is found from its transfers, survives an accident, and is doubted again with time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.bandwidth import EXPECTED, HALF_LIFE_S, RETRY_S, LaneMeter, LaneSpeed
from headrace.core.placement import Tier

MIB = 1 << 20
PRIOR = LaneSpeed(latency_s=3e-3, byte_s=0.5e-9)
SIZES = [MIB, 4 * MIB, 16 * MIB, 64 * MIB]


def metered(lane, num_transfers=20, sizes=SIZES, noise=0.0, seed=0):
    """Return a meter of so many transfers, one a second, and the time after them."""
    rng, meter = np.random.default_rng(seed), LaneMeter(PRIOR)
    for now_s in range(num_transfers):
        size = sizes[now_s % len(sizes)]
        meter.note(size, lane.seconds(size) * float(rng.lognormal(0.0, noise)), float(now_s))
    return meter, float(num_transfers)


def test_nothing_measured_is_as_expected():
    assert LaneMeter(PRIOR).speed(1e9) == PRIOR
    assert set(EXPECTED) == set(Tier)


def test_a_transfer_of_nothing_takes_no_time():
    assert PRIOR.seconds(0) == 0.0


@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0])
def test_latency_and_rate_are_found_from_transfers_of_several_sizes(factor):
    lane = LaneSpeed(latency_s=20e-3 * factor, byte_s=0.3e-9 * factor)
    meter, now_s = metered(lane)
    for size in SIZES:
        assert meter.seconds(size, now_s) == pytest.approx(lane.seconds(size), rel=0.25)


def test_transfers_of_one_size_are_predicted_whatever_their_shape():
    lane = LaneSpeed(latency_s=50e-3, byte_s=1e-9)
    meter, now_s = metered(lane, sizes=[8 * MIB])
    assert meter.seconds(8 * MIB, now_s) == pytest.approx(lane.seconds(8 * MIB), rel=0.1)


def test_the_first_transfer_is_believed():
    lane = LaneSpeed(latency_s=3e-3, byte_s=5e-9)
    meter, now_s = metered(lane, num_transfers=1, sizes=[64 * MIB])
    assert meter.seconds(64 * MIB, now_s) == pytest.approx(lane.seconds(64 * MIB), rel=0.25)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_averaged(seed):
    meter, now_s = metered(PRIOR, num_transfers=40, noise=0.2, seed=seed)
    for size in SIZES:
        assert meter.seconds(size, now_s) == pytest.approx(PRIOR.seconds(size), rel=0.35)


@pytest.mark.parametrize("seed", range(5))
def test_noise_over_sizes_that_hardly_differ_tells_nothing_of_other_sizes(seed):
    meter, now_s = metered(PRIOR, noise=0.2, sizes=[15 * MIB, 16 * MIB, 17 * MIB], seed=seed)
    for size in (MIB, 256 * MIB):
        assert meter.seconds(size, now_s) == pytest.approx(PRIOR.seconds(size), rel=0.5)


@pytest.mark.parametrize("factor", [10.0, 1000.0])
def test_one_accident_counts_for_little(factor):
    meter, now_s = metered(PRIOR)
    before_s = meter.seconds(16 * MIB, now_s)
    meter.note(16 * MIB, factor * before_s, now_s)
    assert meter.seconds(16 * MIB, now_s) < 1.7 * before_s


@pytest.mark.parametrize("factor", [10.0, 1000.0])
def test_two_slow_transfers_in_a_row_are_the_lane(factor):
    meter, now_s = metered(PRIOR)
    slow_s = factor * PRIOR.seconds(16 * MIB)
    for _ in range(2):
        meter.note(16 * MIB, slow_s, now_s)
    assert meter.seconds(16 * MIB, now_s) > 0.5 * slow_s


def test_a_fast_transfer_is_believed_at_once():
    meter, now_s = metered(LaneSpeed(latency_s=0.3, byte_s=50e-9))
    meter.note(16 * MIB, PRIOR.seconds(16 * MIB), now_s)
    assert meter.seconds(16 * MIB, now_s) == pytest.approx(PRIOR.seconds(16 * MIB), rel=0.1)


def test_a_slow_lane_is_tried_again_after_a_while():
    meter, now_s = metered(LaneSpeed(latency_s=0.3, byte_s=50e-9))
    known = meter.speed(now_s)
    assert known.seconds(16 * MIB) > 90 * PRIOR.seconds(16 * MIB)
    assert meter.speed(now_s + 0.9 * RETRY_S) == known
    assert meter.speed(now_s + 1.1 * RETRY_S) == PRIOR


def test_every_try_in_vain_doubles_the_time_until_the_next():
    slow = LaneSpeed(latency_s=0.3, byte_s=50e-9)
    meter, now_s = metered(slow)
    for pause_s in (RETRY_S, 2 * RETRY_S, 4 * RETRY_S):
        assert meter.speed(now_s - 1 + 0.99 * pause_s) != PRIOR
        assert meter.speed(now_s - 1 + 1.01 * pause_s) == PRIOR
        now_s += 1.01 * pause_s
        meter.note(16 * MIB, slow.seconds(16 * MIB), now_s - 1)
    meter.note(16 * MIB, PRIOR.seconds(16 * MIB), now_s)
    meter.note(16 * MIB, slow.seconds(16 * MIB), now_s)
    assert meter.speed(now_s + 1.01 * RETRY_S).latency_s == PRIOR.latency_s


def test_a_good_lane_is_not_doubted():
    meter, now_s = metered(LaneSpeed(latency_s=1e-3, byte_s=0.1e-9))
    assert meter.speed(now_s + 100 * RETRY_S) == meter.speed(now_s)


def test_while_one_tries_a_slow_lane_again_nobody_else_does():
    meter, now_s = metered(LaneSpeed(latency_s=0.3, byte_s=50e-9))
    known = meter.speed(now_s)
    meter.note_try(now_s + 20 * RETRY_S)
    assert meter.speed(now_s + 20 * RETRY_S) == known


def test_an_old_measurement_counts_for_less_than_a_new_one():
    def after(pause_s):
        meter, now_s = metered(PRIOR)
        meter.note(16 * MIB, 2.5 * PRIOR.seconds(16 * MIB), now_s + pause_s)
        return meter.seconds(16 * MIB, now_s + pause_s)

    assert after(5 * HALF_LIFE_S) > 1.5 * after(0.0)


def test_a_transfer_given_up_early_does_not_make_a_slow_lane_look_fast():
    meter, now_s = metered(LaneSpeed(latency_s=3.0, byte_s=50e-9))
    known_s = meter.seconds(16 * MIB, now_s)
    meter.note(16 * MIB, 0.1, now_s, is_whole=False)
    assert meter.seconds(16 * MIB, now_s) >= known_s


def test_a_lane_that_only_hangs_is_soon_left_alone():
    meter = LaneMeter(PRIOR)
    for now_s in range(3):
        meter.note(16 * MIB, 2 * meter.seconds(16 * MIB, float(now_s)), float(now_s), is_whole=False)
    assert meter.seconds(16 * MIB, 3.0) > 20 * PRIOR.seconds(16 * MIB)


@pytest.mark.parametrize("factor", [0.5, 10.0])
def test_a_transfer_that_ends_after_it_was_given_up_tells_what_the_lane_takes(factor):
    lane = LaneSpeed(latency_s=factor * 0.2, byte_s=factor * 10e-9)
    meter = LaneMeter(PRIOR)
    meter.note(64 * MIB, 1.0, 0.0, is_whole=False)
    assert meter.seconds(16 * MIB, 0.1) > 3.0 / 4
    meter.note_late(16 * MIB, lane.seconds(16 * MIB), 0.2)
    assert meter.seconds(16 * MIB, 0.2) == pytest.approx(lane.seconds(16 * MIB), rel=0.01)


def test_a_late_end_leaves_what_was_measured_since_the_transfer_was_given_up():
    meter, now_s = metered(PRIOR)
    meter.note(16 * MIB, 1.0, now_s, is_whole=False)
    for size in SIZES:
        meter.note(size, PRIOR.seconds(size), now_s)
    known_s = meter.seconds(16 * MIB, now_s)
    meter.note_late(16 * MIB, PRIOR.seconds(16 * MIB), now_s)
    assert PRIOR.seconds(16 * MIB) < meter.seconds(16 * MIB, now_s) < known_s


def test_a_try_in_vain_that_ends_late_is_one_try():
    meter, now_s = metered(LaneSpeed(latency_s=1.0, byte_s=100e-9))
    now_s += RETRY_S
    meter.note(16 * MIB, 0.1, now_s, is_whole=False)
    meter.note_late(16 * MIB, 2.0, now_s + 1.0)
    assert meter.seconds(16 * MIB, now_s + 0.9 * 2 * RETRY_S) > 1.0
    assert meter.seconds(16 * MIB, now_s + 1.1 * 2 * RETRY_S) == PRIOR.seconds(16 * MIB)


def test_a_transfer_without_bytes_or_time_tells_nothing():
    meter = LaneMeter(PRIOR)
    meter.note(0, 5.0, 0.0)
    meter.note(MIB, 0.0, 0.0)
    assert meter.speed(0.0) == PRIOR


@given(
    st.lists(
        st.tuples(
            st.integers(1, 1 << 34), st.floats(1e-6, 1e4), st.floats(0.0, 1e5), st.sampled_from([True, False, None])
        ),
        min_size=1,
        max_size=30,
    )
)
def test_whatever_is_measured_seconds_are_positive_and_grow_with_bytes(transfers):
    meter, now_s = LaneMeter(PRIOR), 0.0
    for num_bytes, seconds, pause_s, is_whole in transfers:
        now_s += pause_s
        if is_whole is None:
            meter.note_late(num_bytes, seconds, now_s)
        else:
            meter.note(num_bytes, seconds, now_s, is_whole=is_whole)
        speed = meter.speed(now_s + pause_s)
        assert speed.latency_s > 0
        assert speed.byte_s > 0
        assert speed.seconds(1) <= speed.seconds(1 << 20) < float("inf")
