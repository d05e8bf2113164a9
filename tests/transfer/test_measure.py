"""Measuring a lane."""

from headrace.clock import WallClock
from headrace.testing.connector import Fabric, FakeConnector
from headrace.transfer.arena import map_blocks
from headrace.transfer.measure import measure


async def test_a_measurement_uses_the_given_blocks_only():
    fabric, clock = Fabric(), WallClock()
    own = FakeConnector(fabric, "own", map_blocks(6, 512), "e", clock)
    peer = FakeConnector(fabric, "peer", map_blocks(6, 512), "e", clock)
    own.blocks[:], peer.blocks[:] = 1, 2
    await own.add_peer(peer.pool)
    found = await measure(own, "peer", [4, 5], [2, 3], clock)
    assert found.lane == "fake"
    assert min(found.write_bytes_per_s, found.read_bytes_per_s, found.latency_us) > 0
    assert (own.blocks[:4] == 1).all()
    assert (peer.blocks[[0, 1, 4, 5]] == 2).all()
    assert own.stats().num_inflight == 0
