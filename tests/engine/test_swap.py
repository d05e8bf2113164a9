"""KV in host memory: what comes back is what went out, and places are given out once."""

import random

import pytest
import torch

from headrace.clock import VirtualClock
from headrace.core.block import BlockId
from headrace.engine.swap import FORGOTTEN_S, NUM_LAST, HostSwap
from headrace.testing.runner import FakeRunner

POOL, ROOM = 24, 10


@pytest.fixture
def runner():
    runner = FakeRunner(POOL)
    everything = [BlockId(index) for index in range(POOL)]
    size = runner.read_blocks(everything).shape[1]
    runner.write_blocks(everything, torch.randint(0, 256, (POOL, size), dtype=torch.uint8))
    return runner


def test_measuring_changes_no_block(runner):
    everything = [BlockId(index) for index in range(POOL)]
    before = runner.read_blocks(everything)
    swap = HostSwap(runner, ROOM, POOL, VirtualClock())
    assert torch.equal(runner.read_blocks(everything), before)
    assert swap.view().num_free_blocks == ROOM


def test_what_comes_back_is_what_went_out_whoever_came_and_went_meanwhile(runner):
    rng, swap = random.Random(1), HostSwap(runner, ROOM, POOL, VirtualClock())
    kept = []
    for _ in range(300):
        num_free = swap.view().num_free_blocks
        assert num_free == ROOM - sum(len(saved.places) for saved, _ in kept)
        if num_free and rng.random() < 0.5:
            blocks = [BlockId(index) for index in rng.sample(range(POOL), rng.randint(1, num_free))]
            kept.append((swap.save(blocks, 1), runner.read_blocks(blocks)))
        elif kept:
            saved, wanted = kept.pop(rng.randrange(len(kept)))
            first = rng.randrange(len(saved.places))
            blocks = [BlockId(index) for index in rng.sample(range(POOL), len(saved.places) - first)]
            swap.load(saved, first, blocks)
            assert torch.equal(runner.read_blocks(blocks), wanted[first:])
            swap.drop(saved)


def test_without_room_nothing_is_taken(runner):
    assert HostSwap(runner, 0, POOL, VirtualClock()).view().num_free_blocks == 0


class Busy(FakeRunner):
    """A runner whose copies take some time of a clock."""

    def __init__(self, clock: VirtualClock, seconds: list[float]) -> None:
        super().__init__(POOL)
        self._clock, self._seconds = clock, seconds

    def read_blocks(self, blocks):
        self._clock.advance((self._seconds.pop(0) if self._seconds else 0.001) * len(blocks))
        return super().read_blocks(blocks)

    def write_blocks(self, blocks, data):
        self._clock.advance(0.002 * len(blocks))
        super().write_blocks(blocks, data)


def copied(swap):
    blocks = [BlockId(0), BlockId(1)]
    saved = swap.save(blocks, 1)
    swap.load(saved, 0, blocks)
    swap.drop(saved)


def test_a_machine_that_is_busy_at_the_start_does_not_make_copies_look_slow():
    clock = VirtualClock()
    view = HostSwap(Busy(clock, [0.5, 0.5, 0.5, 0.5]), ROOM, POOL, clock).view()
    assert (view.save_s, view.load_s) == pytest.approx((0.001, 0.002))


def test_one_slow_copy_changes_nothing_and_slow_copies_are_believed_until_they_are_old():
    clock = VirtualClock()
    runner = Busy(clock, [])
    swap = HostSwap(runner, ROOM, POOL, clock)
    runner._seconds.append(0.5)
    copied(swap)
    assert swap.view().save_s == pytest.approx(0.001)
    for _ in range(NUM_LAST):
        runner._seconds.append(0.1)
        copied(swap)
    assert swap.view().save_s == pytest.approx(0.1)
    clock.advance(FORGOTTEN_S)
    assert swap.view().save_s == pytest.approx(0.001)
