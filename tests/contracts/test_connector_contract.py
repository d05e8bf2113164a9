"""What every transport promises, over the fake and over NIXL between processes."""

import asyncio
import dataclasses
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace.clock import WallClock
from headrace.core.block import Span
from headrace.errors import DeadlineExceeded, PeerFailed, PeerMismatch
from headrace.testing.connector import Fabric, FakeConnector
from headrace.testing.transfer_peer import TransferPeer, digest_of
from headrace.transfer.agent import Transport
from headrace.transfer.arena import arena_of, map_blocks
from headrace.transfer.connector import Connector, PoolDescriptor
from headrace.transfer.nixl import NixlConnector

NUM_BLOCKS = 64
BLOCK_BYTES = 368_640
LIMIT_S = 10.0

CLOCK = WallClock()
LANES = [
    "fake",
    pytest.param("nixl", marks=pytest.mark.cluster),
    pytest.param("nixl over tcp", marks=pytest.mark.cluster),
]


@dataclass(kw_only=True)
class Peer:
    """The other side, whatever it is made of."""

    pool: PoolDescriptor
    fill: Callable[[int, int], None]
    digest: Callable[[int], str]
    stall: Callable[[], None]
    resume: Callable[[], None]
    kill: Callable[[], None]


class Bench:
    """One own connector; makes peers."""

    def __init__(self, lane: str) -> None:
        self.blocks = map_blocks(NUM_BLOCKS, BLOCK_BYTES)
        self.fabric = Fabric()
        self.connector = self._connector(lane)
        self._processes: list[TransferPeer] = []
        self._lane = lane

    def _connector(self, lane: str) -> Connector:
        name = f"own-{time.monotonic_ns()}"
        if lane == "fake":
            return FakeConnector(self.fabric, name, self.blocks, "own", CLOCK)
        return NixlConnector(Transport(name), arena_of(self.blocks), "own", CLOCK)

    async def peer(self) -> Peer:
        found = self._fake_peer() if self._lane == "fake" else self._process_peer()
        await self.connector.add_peer(found.pool)
        return found

    def _fake_peer(self) -> Peer:
        blocks = np.zeros((NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
        name = f"peer-{time.monotonic_ns()}"
        fake = FakeConnector(self.fabric, name, blocks, "peer", CLOCK)
        return Peer(
            pool=fake.pool,
            fill=lambda block, byte: blocks[block].fill(byte),
            digest=lambda block: digest_of(blocks[block].tobytes()),
            stall=lambda: self.fabric.stall(name),
            resume=lambda: self.fabric.resume(name),
            kill=lambda: self.fabric.kill(name),
        )

    def _process_peer(self) -> Peer:
        process = TransferPeer(NUM_BLOCKS, BLOCK_BYTES)
        self._processes.append(process)
        return Peer(
            pool=process.pool,
            fill=process.fill,
            digest=process.digest,
            stall=lambda: process.signal(signal.SIGSTOP),
            resume=lambda: process.signal(signal.SIGCONT),
            kill=lambda: process.signal(signal.SIGKILL),
        )

    async def close(self) -> None:
        await self.connector.close()
        for process in self._processes:
            process.__exit__()


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "nixl over tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    return request.param


@pytest.fixture
async def bench(lane: str) -> AsyncIterator[Bench]:
    made = Bench(lane)
    yield made
    await made.close()


def soon() -> float:
    return CLOCK.now() + LIMIT_S


def numbered(blocks: NDArray[np.uint8]) -> None:
    """Give every block another content, and every part of a block too."""
    words = blocks.view(np.uint64)
    words[:] = np.arange(words.size, dtype=np.uint64).reshape(words.shape)


async def until(is_true: Callable[[], bool], limit_s: float = 5.0) -> None:
    async with asyncio.timeout(limit_s):
        while not is_true():  # noqa: ASYNC110 what is waited for is a counter
            await asyncio.sleep(0.002)


@asynccontextmanager
async def stalled(peer: Peer) -> AsyncIterator[None]:
    peer.stall()
    try:
        yield
    finally:
        peer.resume()


async def test_blocks_go_both_ways_whole_and_to_the_named_places(bench):
    peer = await bench.peer()
    name = peer.pool.agent_name
    numbered(bench.blocks)
    local, remote = list(range(40)), list(range(63, 23, -1))
    await bench.connector.write(name, local, remote, soon())
    for own, other in zip(local, remote, strict=True):
        assert peer.digest(other) == digest_of(bench.blocks[own].tobytes())
    assert peer.digest(0) == digest_of(bytes(BLOCK_BYTES))

    sent = bench.blocks[:40].copy()
    bench.blocks[:] = 0
    peer.fill(0, 7)
    await bench.connector.read(name, [50, *local], [0, *remote], soon())
    assert (bench.blocks[:40] == sent).all()
    assert (bench.blocks[50] == 7).all()
    assert not bench.blocks[51:].any()
    stats = bench.connector.stats()
    assert (stats.written_bytes, stats.read_bytes) == (40 * BLOCK_BYTES, 41 * BLOCK_BYTES)
    assert (stats.num_done, stats.num_failed) == (2, 0)
    await until(lambda: bench.connector.stats().num_inflight == 0)


async def test_a_part_of_each_block_is_read_and_the_rest_left_alone(bench):
    peer = await bench.peer()
    name = peer.pool.agent_name
    numbered(bench.blocks)
    sent = bench.blocks.copy()
    await bench.connector.write(name, range(8), range(40, 48), soon())
    bench.blocks[:] = 7
    num_read = bench.connector.stats().read_bytes
    span = Span(4096, 4096 + 65_536)
    await bench.connector.read(name, [9, 3, 20], [42, 40, 47], soon(), span)
    expected = np.full_like(sent, 7)
    for own, origin in ((9, 2), (3, 0), (20, 7)):
        expected[own, span.start : span.end] = sent[origin, span.start : span.end]
    assert np.array_equal(bench.blocks, expected)
    assert bench.connector.stats().read_bytes - num_read == 3 * 65_536


@pytest.mark.parametrize("span", [Span(0, 0), Span(-8, 8), Span(8, BLOCK_BYTES + 1), Span(64, 8)])
async def test_a_part_that_no_block_has_is_refused(bench, span):
    peer = await bench.peer()
    with pytest.raises(ValueError, match="no part of a block"):
        await bench.connector.read(peer.pool.agent_name, [0], [0], soon(), span)


async def test_many_transfers_at_once_all_land(bench):
    peer = await bench.peer()
    name = peer.pool.agent_name
    numbered(bench.blocks[:32])
    await asyncio.gather(*(bench.connector.write(name, [n], [n], soon()) for n in range(32)))
    await asyncio.gather(*(bench.connector.read(name, [32 + n], [n], soon()) for n in range(32)))
    assert (bench.blocks[32:] == bench.blocks[:32]).all()


async def test_nothing_to_move_is_done_at_once(bench):
    peer = await bench.peer()
    await bench.connector.write(peer.pool.agent_name, [], [], soon())
    assert bench.connector.stats().num_inflight == 0


async def test_wrong_names_are_refused(bench):
    peer = await bench.peer()
    name = peer.pool.agent_name
    with pytest.raises(PeerFailed):
        await bench.connector.read("nobody", [0], [0], soon())
    with pytest.raises(PeerFailed):
        await bench.connector.read(name, [0], [NUM_BLOCKS], soon())
    with pytest.raises(ValueError, match="own block ids"):
        await bench.connector.read(name, [NUM_BLOCKS], [0], soon())
    with pytest.raises(ValueError, match="own blocks for"):
        await bench.connector.read(name, [0, 1], [0], soon())
    assert bench.connector.stats().num_inflight == 0


async def test_a_peer_that_cannot_be_understood_is_refused(bench):
    peer = await bench.peer()
    with pytest.raises(PeerFailed):
        await bench.connector.add_peer(
            dataclasses.replace(peer.pool, agent_name="garbage", agent_metadata=b"no such thing")
        )
    await bench.connector.remove_peer(peer.pool.agent_name)
    with pytest.raises(PeerMismatch):
        await bench.connector.add_peer(dataclasses.replace(peer.pool, block_bytes=BLOCK_BYTES // 2))
    await bench.connector.add_peer(peer.pool)
    await bench.connector.read(peer.pool.agent_name, [0], [0], soon())


async def test_a_removed_peer_can_be_met_again(bench):
    peer = await bench.peer()
    name = peer.pool.agent_name
    await bench.connector.read(name, [0], [0], soon())
    await bench.connector.remove_peer(name)
    await bench.connector.remove_peer("never met")
    with pytest.raises(PeerFailed):
        await bench.connector.read(name, [0], [0], soon())
    peer.fill(3, 9)
    await bench.connector.add_peer(peer.pool)
    await bench.connector.add_peer(peer.pool)
    await bench.connector.read(name, [0], [3], soon())
    assert (bench.blocks[0] == 9).all()


async def test_a_killed_peer_fails_its_transfers_within_a_second_and_no_others(bench):
    doomed, other = await bench.peer(), await bench.peer()

    async def keep_writing() -> None:
        while True:
            await bench.connector.write(doomed.pool.agent_name, range(NUM_BLOCKS), range(NUM_BLOCKS), soon())

    writing = asyncio.create_task(keep_writing())
    await until(lambda: bench.connector.stats().num_done >= 2)
    doomed.kill()
    killed_s = time.monotonic()
    with pytest.raises(PeerFailed):
        await writing
    with pytest.raises(PeerFailed):
        await bench.connector.read(doomed.pool.agent_name, [0], [0], soon())
    assert time.monotonic() - killed_s < 1.0
    await bench.connector.remove_peer(doomed.pool.agent_name)
    await bench.connector.read(other.pool.agent_name, [0], [0], soon())
    await until(lambda: bench.connector.stats().num_inflight == 0)


async def test_a_stalled_peer_costs_the_deadline_and_its_blocks_until_it_moves_again(bench):
    peer = await bench.peer()
    name, settled, late = peer.pool.agent_name, [], []
    # Where blocks are moved by memory access alone, only wiring up needs the peer: this is the first transfer.
    async with stalled(peer):
        begun_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await bench.connector.read(name, [4, 5], [0, 1], CLOCK.now() + 0.2, on_late=lambda: late.append(True))
        assert 0.2 <= time.monotonic() - begun_s < 1.0
        bench.connector.when_settled([5, 6], lambda: settled.append("touched"))
        bench.connector.when_settled([6, 7], lambda: settled.append("untouched"))
        assert settled == ["untouched"]
        assert bench.connector.stats().num_inflight == 1
        assert late == []
    await until(lambda: settled == ["untouched", "touched"])
    await until(lambda: late == [True])
    assert bench.connector.stats().num_inflight == 0
    await bench.connector.read(name, [4, 5], [0, 1], soon(), on_late=lambda: late.append(False))
    assert late == [True]


async def test_a_read_from_a_peer_that_dies_while_it_is_stalled_does_not_land_late(bench):
    peer = await bench.peer()
    late = []
    peer.stall()
    with pytest.raises(DeadlineExceeded):
        await bench.connector.read(peer.pool.agent_name, [4], [0], CLOCK.now() + 0.1, on_late=lambda: late.append(True))
    settled = asyncio.Event()
    bench.connector.when_settled([4], settled.set)
    peer.kill()
    await asyncio.wait_for(settled.wait(), 2.0)
    assert late == []


async def test_a_peer_that_dies_while_it_is_stalled_settles_its_transfers(bench):
    peer = await bench.peer()
    peer.stall()
    with pytest.raises(DeadlineExceeded):
        await bench.connector.write(peer.pool.agent_name, [4], [0], CLOCK.now() + 0.1)
    settled = asyncio.Event()
    bench.connector.when_settled([4], settled.set)
    assert not settled.is_set()
    peer.kill()
    await asyncio.wait_for(settled.wait(), 2.0)
    assert bench.connector.stats().num_failed == 1


async def test_removing_a_stalled_peer_fails_its_transfers_but_does_not_settle_them(bench):
    peer = await bench.peer()
    name = peer.pool.agent_name
    async with stalled(peer):
        reading = asyncio.create_task(bench.connector.read(name, [4], [0], soon()))
        await until(lambda: bench.connector.stats().num_inflight == 1)
        await asyncio.sleep(0.05)
        await bench.connector.remove_peer(name)
        with pytest.raises(PeerFailed):
            await reading
        settled = asyncio.Event()
        bench.connector.when_settled([4], settled.set)
        assert not settled.is_set()
    await asyncio.wait_for(settled.wait(), 2.0)


async def test_a_cancelled_caller_leaves_the_transfer_to_its_end(bench):
    peer = await bench.peer()
    name = peer.pool.agent_name
    numbered(bench.blocks)
    async with stalled(peer):
        writing = asyncio.create_task(bench.connector.write(name, [9], [9], soon()))
        await until(lambda: bench.connector.stats().num_inflight == 1)
        await asyncio.sleep(0.05)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        settled = asyncio.Event()
        bench.connector.when_settled([9], settled.set)
        assert not settled.is_set()
    await asyncio.wait_for(settled.wait(), 2.0)
    assert peer.digest(9) == digest_of(bench.blocks[9].tobytes())


async def test_closing_ends_what_is_in_flight_and_refuses_more(bench):
    peer = await bench.peer()
    name = peer.pool.agent_name
    async with stalled(peer):
        reading = asyncio.create_task(bench.connector.read(name, [4], [0], soon()))
        await until(lambda: bench.connector.stats().num_inflight == 1)
        await asyncio.sleep(0.05)
        await bench.connector.close()
        with pytest.raises(PeerFailed):
            await reading
    with pytest.raises(PeerFailed):
        await bench.connector.read(name, [4], [0], soon())
    await until(lambda: bench.connector.stats().num_inflight == 0)


async def test_the_lane_has_a_name(bench, lane):
    peer = await bench.peer()
    await bench.connector.read(peer.pool.agent_name, [0], [0], soon())
    expected = {"fake": "fake", "nixl over tcp": "tcp"}
    found = await bench.connector.lane(peer.pool.agent_name)
    assert found == expected.get(lane, found)
    assert found
    with pytest.raises(PeerFailed):
        await bench.connector.lane("nobody")
