"""Blocks are promised to one writer at a time, and held until it has ended or its time is over."""

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule

from headrace.clock import VirtualClock
from headrace.core.request import Token
from headrace.decode.reservations import LANDING_S, WRITER_GRACE_S, Origin, Reservations, Reused
from headrace.engine.messages import EngineStats, HoldWriter, ReleaseWriter
from headrace.errors import DeadlineExceeded, Saturated
from headrace.worker.engine import AsyncEngine

EPOCH = "e1"
ORIGIN = Origin(address="p0:1", epoch="p0-1")
FIRST = Token(cursor=0, token_id=7)


class RecordingPort:
    """Holds what it was told to hold, as the engine's ledger would."""

    def __init__(self):
        self.held = {}
        self.is_full = False

    def send(self, command):
        match command:
            case HoldWriter(writer_id=writer, block_ids=blocks):
                if self.is_full:
                    raise Saturated("full")
                assert writer not in self.held
                self.held[writer] = blocks
            case ReleaseWriter(writer_id=writer):
                del self.held[writer]

    def stats(self):
        return EngineStats()


class Ends:
    """Knows which processes are gone, as `Lifetimes` finds out by asking."""

    def __init__(self):
        self.over = set()
        self.asked = []

    async def is_over(self, address, epoch):
        self.asked.append((address, epoch))
        return (address, epoch) in self.over


class Desk:
    def __init__(self):
        self.port, self.clock, self.ends = RecordingPort(), VirtualClock(1000.0), Ends()
        self.reservations = Reservations(AsyncEngine(self.port, None), self.clock, EPOCH, self.ends)

    def grant(self, *blocks, life_s=10.0):
        return self.reservations.grant(blocks, self.clock.unix_ms() + int(life_s * 1000))

    def begin(self, reservation, writer="w", epoch=EPOCH, origin=ORIGIN):
        return self.reservations.begin_write(reservation.lease_id, epoch, writer, origin)

    def commit(self, reservation, writer="w"):
        return self.reservations.commit(reservation.lease_id, writer, FIRST, Reused())


@pytest.fixture
def desk():
    return Desk()


def test_a_writer_holds_the_blocks_from_its_begin_to_its_end(desk):
    reservation = desk.grant(3, 4)
    assert desk.port.held == {}
    assert desk.begin(reservation)
    assert desk.port.held == {"w": (3, 4)}
    desk.reservations.end_write("w")
    assert desk.port.held == {}
    assert desk.reservations.num_writers() == 0


def test_blocks_of_a_sequence_that_left_stay_held_until_its_writer_ends(desk):
    reservation = desk.grant(3, 4)
    desk.begin(reservation)
    desk.reservations.revoke(reservation)
    assert desk.port.held == {"w": (3, 4)}
    assert not desk.commit(reservation)
    assert desk.port.held == {}


def test_a_writer_that_never_reports_is_ended_by_the_clock_and_not_earlier(desk):
    desk.begin(desk.grant(3, life_s=10.0))
    desk.clock.advance(10.0 + WRITER_GRACE_S - 0.001)
    assert desk.reservations.expire_writers() == 0
    desk.clock.advance(0.001)
    assert desk.reservations.expire_writers() == 1
    assert desk.port.held == {}


def test_nobody_may_write_after_the_sequence_left(desk):
    reservation = desk.grant(3)
    desk.reservations.revoke(reservation)
    assert not desk.begin(reservation)
    assert desk.port.held == {}


def test_a_writer_for_another_epoch_is_fenced(desk):
    assert not desk.begin(desk.grant(3), epoch="e0")
    assert desk.port.held == {}


def test_nobody_may_write_once_the_kv_has_landed(desk):
    reservation = desk.grant(3)
    desk.begin(reservation)
    assert desk.commit(reservation)
    assert not desk.begin(reservation, "late")
    assert desk.port.held == {}


def test_a_second_commit_is_refused(desk):
    reservation = desk.grant(3)
    desk.begin(reservation)
    assert desk.commit(reservation)
    assert not desk.commit(reservation)


def test_a_commit_by_nobody_known_is_refused(desk):
    reservation = desk.grant(3)
    assert not desk.commit(reservation)
    assert not reservation.landed.is_set()


def test_a_writer_of_one_reservation_cannot_commit_another(desk):
    mine, other = desk.grant(3), desk.grant(4)
    desk.begin(mine)
    assert not desk.commit(other)
    assert not other.landed.is_set()


def test_a_writer_of_one_reservation_is_no_writer_of_another(desk):
    desk.begin(desk.grant(3))
    assert not desk.begin(desk.grant(4))
    assert desk.port.held == {"w": (3,)}


def test_a_second_writer_waits_for_the_end_of_the_first(desk):
    """Two writers on one lease: the late data of one would overwrite what the other has delivered."""
    reservation = desk.grant(3)
    assert desk.begin(reservation, "first")
    assert not desk.begin(reservation, "second")
    desk.reservations.end_write("first")
    assert desk.begin(reservation, "second")
    assert desk.commit(reservation, "second")


def test_a_writer_whose_end_came_first_cannot_begin(desk):
    """The router ends a dead worker's writer; the begin that was still on its way must hold nothing."""
    reservation = desk.grant(3)
    desk.reservations.end_write("w", reservation.lease_id)
    assert not desk.begin(reservation)
    assert desk.port.held == {}


def test_a_repeated_begin_holds_once(desk):
    reservation = desk.grant(3)
    assert desk.begin(reservation)
    assert desk.begin(reservation)
    desk.reservations.end_write("w")
    assert desk.port.held == {}


def test_a_begin_that_the_engine_has_no_room_for_leaves_nothing(desk):
    reservation = desk.grant(3)
    desk.port.is_full = True
    with pytest.raises(Saturated):
        desk.begin(reservation)
    assert desk.reservations.num_writers() == 0
    desk.port.is_full = False
    assert desk.begin(reservation)


def test_a_lost_writer_that_never_began_makes_room_for_another(desk):
    reservation = desk.grant(3)
    assert desk.reservations.lose(reservation.lease_id, "w")
    assert not desk.begin(reservation), "its begin was still on its way"
    assert desk.begin(reservation, "second")


def test_a_lost_writer_that_has_begun_keeps_its_blocks_and_nobody_joins_it(desk):
    """Out of the router's reach it may live and write."""
    reservation = desk.grant(3)
    desk.begin(reservation)
    assert not desk.reservations.lose(reservation.lease_id, "w")
    assert not desk.begin(reservation, "second")
    desk.reservations.revoke(reservation)
    assert not desk.reservations.lose(reservation.lease_id, "w")
    assert desk.port.held == {"w": (3,)}
    desk.reservations.end_write("w")
    assert desk.port.held == {}


def test_a_lease_that_is_gone_has_no_room_for_another(desk):
    reservation = desk.grant(3)
    desk.reservations.revoke(reservation)
    assert not desk.reservations.lose(reservation.lease_id, "w")


async def test_a_writer_whose_process_is_gone_ends_once_its_last_data_have_landed(desk):
    reservation = desk.grant(3)
    desk.begin(reservation)
    desk.reservations.revoke(reservation)
    desk.ends.over.add((ORIGIN.address, ORIGIN.epoch))
    assert await desk.reservations.review_writers() == 1
    desk.clock.advance(LANDING_S - 0.001)
    assert desk.reservations.expire_writers() == 0
    await desk.reservations.review_writers()
    desk.clock.advance(0.001)
    assert desk.reservations.expire_writers() == 1
    assert desk.port.held == {}


async def test_a_writer_whose_process_may_live_is_held(desk):
    reservation = desk.grant(3)
    desk.begin(reservation)
    desk.reservations.revoke(reservation)
    desk.ends.over.add((ORIGIN.address, "another life"))
    assert await desk.reservations.review_writers() == 0
    desk.clock.advance(LANDING_S)
    assert desk.reservations.expire_writers() == 0


async def test_an_end_does_not_move_away(desk):
    """A review just before the clock's own end must not prolong it."""
    reservation = desk.grant(3, life_s=10.0)
    desk.begin(reservation)
    desk.reservations.revoke(reservation)
    desk.ends.over.add((ORIGIN.address, ORIGIN.epoch))
    desk.clock.advance(10.0 + WRITER_GRACE_S - LANDING_S / 2)
    await desk.reservations.review_writers()
    desk.clock.advance(LANDING_S / 2)
    assert desk.reservations.expire_writers() == 1


async def test_nobody_is_asked_about_a_writer_that_a_sequence_waits_for_or_that_named_no_address(desk):
    waiting, left = desk.grant(3), desk.grant(4)
    desk.begin(waiting, "one")
    desk.begin(left, "other", origin=Origin(address="", epoch=""))
    desk.reservations.revoke(left)
    assert await desk.reservations.review_writers() == 0
    assert desk.ends.asked == []
    desk.reservations.revoke(waiting)
    await desk.reservations.review_writers()
    assert desk.ends.asked == [(ORIGIN.address, ORIGIN.epoch)]


async def test_waiting_ends_with_the_first_token(desk):
    reservation = desk.grant(3)
    waiting = asyncio.ensure_future(desk.reservations.wait(reservation))
    await asyncio.sleep(0)
    desk.begin(reservation)
    desk.commit(reservation)
    assert await waiting == FIRST


async def test_waiting_ends_with_the_deadline(desk):
    reservation = desk.grant(3, life_s=0.001)
    with pytest.raises(DeadlineExceeded):
        await desk.reservations.wait(reservation)


def test_lease_ids_cannot_be_guessed_and_never_repeat(desk):
    ids = {desk.grant(3).lease_id for _ in range(100)}
    assert len(ids) == 100
    assert min(map(len, ids)) >= 32


class ReservationMachine(RuleBasedStateMachine):
    """Any order of begins, commits, ends, revocations and time keeps writers' blocks held, and no others."""

    reservations = Bundle("reservations")
    writers = Bundle("writers")

    def __init__(self):
        super().__init__()
        self.desk = Desk()
        self.num_blocks = 0
        self.open = {}  # writer -> (blocks, end of its time)
        self.live = set()
        self.landed = set()

    @rule(target=reservations, life_s=st.integers(1, 30))
    def grant(self, life_s):
        self.num_blocks += 2
        reservation = self.desk.grant(self.num_blocks, self.num_blocks + 1, life_s=life_s)
        self.live.add(reservation.lease_id)
        return reservation

    @rule(target=writers, reservation=reservations, epoch=st.sampled_from([EPOCH, "e0"]), index=st.integers(0, 3))
    def begin(self, reservation, epoch, index):
        writer = f"w{index}"
        was_open = writer in self.open
        accepted = self.desk.begin(reservation, writer, epoch)
        if accepted:
            assert epoch == EPOCH
            assert reservation.lease_id in self.live - self.landed
            if was_open:
                assert self.open[writer][0] == reservation.block_ids
            end_s = reservation.deadline_unix_ms / 1000 + WRITER_GRACE_S
            self.open.setdefault(writer, (reservation.block_ids, end_s))
        return (writer, reservation) if accepted else multiple()

    @rule(reservation=reservations, index=st.integers(0, 3))
    def commit(self, reservation, index):
        writer = f"w{index}"
        held = self.open.pop(writer, None)
        accepted = self.desk.commit(reservation, writer)
        if accepted:
            assert held is not None
            assert held[0] == reservation.block_ids
            assert reservation.lease_id in self.live - self.landed
            self.landed.add(reservation.lease_id)
        assert reservation.landed.is_set() == (reservation.lease_id in self.landed)

    @rule(writer=writers)
    def end(self, writer):
        self.desk.reservations.end_write(writer[0])
        self.open.pop(writer[0], None)

    @rule(reservation=reservations)
    def revoke(self, reservation):
        self.desk.reservations.revoke(reservation)
        self.live.discard(reservation.lease_id)

    @precondition(lambda self: self.open)
    @rule(seconds=st.integers(1, 20))
    def time_passes(self, seconds):
        self.desk.clock.advance(seconds)
        self.desk.reservations.expire_writers()
        now_s = self.desk.clock.now()
        self.open = {writer: entry for writer, entry in self.open.items() if entry[1] > now_s}

    @invariant()
    def writers_and_nobody_else_hold_their_blocks(self):
        assert self.desk.port.held == {writer: blocks for writer, (blocks, _) in self.open.items()}
        assert self.desk.reservations.num_writers() == len(self.open)

    @invariant()
    def no_block_has_two_writers(self):
        held = [block for blocks in self.desk.port.held.values() for block in blocks]
        assert len(held) == len(set(held))


ReservationMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = ReservationMachine.TestCase
