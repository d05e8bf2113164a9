"""Redis away, back, and back without its memory, under publishing."""

import pytest

from headrace.clock import WallClock
from headrace.index.connection import RedisConfig, connect
from headrace.index.log import IndexLog, Lifetime
from headrace.index.publisher import IndexPublisher
from headrace.index.replica import IndexReplica
from headrace.testing.index import SimpleIndex
from headrace.testing.index_log import block, removed, running, stored, until
from headrace.testing.redis import redis_server


@pytest.fixture(autouse=True)
def _impatience(monkeypatch):
    for part in ("publisher", "replica"):
        monkeypatch.setattr(f"headrace.index.{part}.LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr("headrace.index.publisher.INTERVAL_S", 0.02)
    monkeypatch.setattr("headrace.index.publisher.HEARTBEAT_S", 0.05)
    monkeypatch.setattr("headrace.index.replica.FIRST_PAUSE_S", 0.02)


class Party:
    """A publisher and a replica of one server, each with a connection of its own."""

    def __init__(self, url, grace_s=30.0):
        config = RedisConfig(url=url, timeout_s=0.3, connect_timeout_s=0.3)
        self.clients = [connect(config), connect(config)]
        life = Lifetime(location="w1", epoch="a", started_unix_ms=1)
        self.publisher = IndexPublisher(IndexLog(self.clients[0]), life, WallClock())
        self.index = SimpleIndex()
        self.replica = IndexReplica(IndexLog(self.clients[1]), self.index, WallClock(), grace_s=grace_s, wait_s=0.1)

    def blocks(self):
        return {int.from_bytes(block_hash, "big") for _, block_hash in self.index.blocks("w1") or ()}

    def work(self):
        return self.publisher.run(), self.replica.run()

    async def close(self):
        for client in self.clients:
            await client.aclose()

    async def is_away(self):
        await until(lambda: not self.publisher.is_connected and not self.replica.state().is_connected)


@pytest.mark.parametrize("how", ["freeze", "kill"])
async def test_replicas_serve_the_last_state_while_redis_is_away_and_catch_up(tmp_path, how):
    with redis_server(tmp_path, "appendonly yes", "appendfsync always") as server:
        party = Party(server.url)
        async with running(*party.work()):
            party.publisher.note([stored(range(5))])
            await until(lambda: party.blocks() == set(range(5)))

            getattr(server, how)()
            party.publisher.note([stored([7]), removed([1])])
            await party.is_away()
            party.publisher.note([stored([8]), removed([7])])
            assert party.blocks() == set(range(5))
            assert party.replica.state().problem
            assert not party.publisher.is_current

            server.thaw() if how == "freeze" else server.start()
            await until(lambda: party.blocks() == {0, 2, 3, 4, 8})
            await until(lambda: party.publisher.is_current and party.replica.state().problem == "")
        assert party.publisher.num_resyncs == 0
        await party.close()


async def test_a_redis_that_comes_back_empty_is_told_everything_again(tmp_path):
    with redis_server(tmp_path / "redis") as server:
        party = Party(server.url)
        async with running(*party.work()):
            party.publisher.note([stored(range(5))])
            await until(lambda: party.blocks() == set(range(5)))

            server.restart(is_empty=True)
            await until(lambda: party.publisher.num_resyncs == 1)
            assert party.blocks() == set(range(5))
            party.publisher.note([stored([9])])
            await until(lambda: party.blocks() == {0, 1, 2, 3, 4, 9})
        late = SimpleIndex()
        replica = IndexReplica(IndexLog(party.clients[1]), late, WallClock())
        for _ in range(3):
            await replica.step(0.0)
        assert late.blocks("w1") == party.index.blocks("w1")
        await party.close()


async def test_a_location_that_an_empty_redis_does_not_hear_of_again_is_dropped_after_a_grace_time(tmp_path):
    with redis_server(tmp_path / "redis") as server:
        party = Party(server.url, grace_s=0.3)
        publish, follow = party.work()
        async with running(follow):
            async with running(publish):
                party.publisher.note([stored([1])])
                await until(lambda: party.blocks() == {1})
            reloads = party.replica.state().num_reloads
            server.restart(is_empty=True)
            await until(lambda: party.replica.state().num_reloads > reloads)
            assert party.blocks() == {1}
            await until(lambda: party.index.blocks("w1") is None)
        await party.close()


async def test_changes_noted_before_redis_is_there_are_published_when_it_is(tmp_path):
    with redis_server(tmp_path / "redis") as server:
        server.kill()
        party = Party(server.url)
        party.publisher.note([stored([1, 2])])
        async with running(*party.work()):
            await until(lambda: "Error" in party.publisher.problem)
            server.start()
            await until(lambda: party.blocks() == {1, 2})
        assert party.index.blocks("w1").keys() == {(1, block(1)), (1, block(2))}
        await party.close()
