"""KV in host memory: what comes back is what went out, and places are given out once."""

import random

import pytest
import torch

from headrace.clock import VirtualClock
from headrace.core.block import BlockId
from headrace.engine.swap import HostSwap
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
