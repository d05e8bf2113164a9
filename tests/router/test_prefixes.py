"""The index is asked who holds a prefix; a kvstore that stalls costs one request per pause, not each."""

import asyncio

import pytest

from headrace.clock import VirtualClock
from headrace.core.block import block_hashes, root_hash
from headrace.router import prefixes
from headrace.router.prefixes import FIRST_PAUSE_S, LONGEST_PAUSE_S, PrefixQueries
from headrace.runtime.channels import Channels
from headrace.testing.fleet import BLOCK_TOKENS, FINGERPRINT, open_fleet
from headrace.testing.lane import FaultyLane

HASHES = block_hashes(root_hash(FINGERPRINT, b""), range(10, 28), BLOCK_TOKENS)


class CountingChannels(Channels):
    num_calls = 0

    def get(self, address):
        self.num_calls += 1
        return super().get(address)


class Bench:
    """A kvstore behind a lane, and the router's questions to it."""

    def __init__(self, lane, channels):
        self.lane, self.channels, self.clock = lane, channels, VirtualClock(50.0)
        self.queries = PrefixQueries(lane.address, channels, self.clock)

    async def num_calls(self, count):
        """Ask so often at once; return how many calls that made."""
        before = self.channels.num_calls
        await asyncio.gather(*(self.queries.match(HASHES) for _ in range(count)))
        return self.channels.num_calls - before


@pytest.fixture
async def bench(tmp_path, roles, monkeypatch):
    monkeypatch.setattr(prefixes, "MATCH_TIMEOUT_S", 0.1)
    lane = FaultyLane()
    async with open_fleet(tmp_path, roles("h0"), kvstore=True) as fleet, CountingChannels() as channels:
        await lane.open()
        lane.connect(int(fleet.kvstore.rpartition(":")[2]))
        await fleet.workers["h0"].blocks._client.announce(HASHES[:3], ())
        made = Bench(lane, channels)
        monkeypatch.setattr(prefixes, "MATCH_TIMEOUT_S", 5.0)
        assert await made.queries.match(HASHES) == {"h0": 3}
        monkeypatch.setattr(prefixes, "MATCH_TIMEOUT_S", 0.1)
        yield made
        await lane.cut()


async def test_everybody_asks_while_the_kvstore_answers(bench):
    assert await bench.num_calls(3) == 3


async def test_nothing_is_asked_about_a_prompt_without_a_full_block(bench):
    assert await bench.queries.match(()) == {}
    assert bench.channels.num_calls == 1


async def test_a_stalled_kvstore_costs_one_request_per_growing_pause(bench):
    bench.lane.stall()
    assert await bench.queries.match(HASHES) == {}
    pause_s = FIRST_PAUSE_S
    for _ in range(6):
        assert await bench.num_calls(5) == 0
        bench.clock.advance(pause_s - 0.001)
        assert await bench.num_calls(5) == 0
        bench.clock.advance(0.002)
        assert await bench.num_calls(5) == 1
        pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
    bench.lane.resume()


async def test_a_kvstore_that_goes_on_is_asked_by_everybody_again(bench, monkeypatch):
    bench.lane.stall()
    assert await bench.queries.match(HASHES) == {}
    bench.lane.resume()
    bench.clock.advance(FIRST_PAUSE_S)
    monkeypatch.setattr(prefixes, "MATCH_TIMEOUT_S", 5.0)
    assert await bench.queries.match(HASHES) == {"h0": 3}
    assert await bench.num_calls(3) == 3
