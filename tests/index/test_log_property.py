"""Whatever is stored, removed, trimmed, lost and begun again: replicas end as the locations are."""

import asyncio
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as RedisConnectionError

from headrace.clock import WallClock
from headrace.index.connection import RedisConfig, connect
from headrace.index.log import IndexLog, Lifetime
from headrace.index.prefix_index import PrefixIndex
from headrace.index.publisher import IndexPublisher
from headrace.index.replica import IndexReplica
from headrace.testing.index import SimpleIndex
from headrace.testing.index_log import block, removed, stored
from headrace.testing.redis import redis_server

LOCATIONS = ("w0", "w1", "w2")
SETTLE_STEPS = 6


class LossyLog(IndexLog):
    """Loses the answer of the next write."""

    loses_answer = False

    async def _write(self, *args):
        answer = await super()._write(*args)
        if self.loses_answer:
            self.loses_answer = False
            raise RedisConnectionError("the answer was lost")
        return answer


class Play:
    """Locations with what they hold, a replica that lives through it all, and what is done to them."""

    def __init__(self, redis):
        self.redis = redis
        self.log = LossyLog(redis, keep_s=0)
        self.index = SimpleIndex()
        self.replica = IndexReplica(self.log, self.index, WallClock(), grace_s=0.0)
        self.started = itertools.count(1)
        self.held, self.publishers, self.saved = {}, {}, None
        for name in LOCATIONS:
            self.restart(name)

    def restart(self, name):
        started = next(self.started)
        life = Lifetime(location=name, epoch=f"e{started}", started_unix_ms=started)
        self.publishers[name] = IndexPublisher(self.log, life, WallClock(), least_snapshot_bytes=40)
        self.held[name] = set()

    def store(self, name, numbers):
        self.held[name].update(numbers)
        self.publishers[name].note([stored(numbers)])

    def remove(self, name, numbers):
        self.held[name].difference_update(numbers)
        self.publishers[name].note([removed(numbers)])

    async def publish(self, name):
        try:
            await self.publishers[name].step()
        except RedisConnectionError:
            self.publishers[name].is_connected = False

    async def lose(self, name):
        self.log.loses_answer = True
        await self.publish(name)
        self.log.loses_answer = False

    async def read(self):
        await self.replica.step(0.0)

    async def save(self):
        self.saved = {key: await self.redis.dump(key) for key in await self.redis.keys()}

    async def roll_back(self):
        if self.saved is not None:
            await self.empty()
            for key, value in self.saved.items():
                await self.redis.restore(key, 0, value)

    async def empty(self):
        await self.redis.flushall()

    async def settle(self, replica):
        for _ in range(SETTLE_STEPS):
            for name in LOCATIONS:
                await self.publish(name)
            await replica.step(0.0)


numbers = st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True)
names = st.sampled_from(LOCATIONS)
actions = st.one_of(
    st.tuples(st.sampled_from(["store", "store", "remove"]), names, numbers),
    st.tuples(st.sampled_from(["publish", "publish", "publish", "publish", "lose", "restart"]), names),
    st.tuples(st.sampled_from(["read", "read", "read", "save", "roll_back", "empty"])),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def blocks_by_location(index):
    found = {state.name: set() for state in index.locations()}
    for one in map(block, range(31)):
        for match in index.match([one]):
            found[match.location].add(one)
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=st.lists(actions, max_size=40))
def test_replicas_end_as_the_locations_are(server, program):
    async def play():
        redis = connect(RedisConfig(url=server.url))
        await redis.flushall()
        play = Play(redis)
        for name, *args in program:
            result = getattr(play, name)(*args)
            if result is not None:
                await result
        await play.settle(play.replica)
        fresh, real = SimpleIndex(), PrefixIndex(budget_bytes=1 << 20, max_locations=8)
        await play.settle(IndexReplica(play.log, fresh, WallClock()))
        await play.settle(IndexReplica(play.log, real, WallClock()))
        await redis.aclose()
        assert blocks_by_location(real) == {name: set(map(block, held)) for name, held in play.held.items()}
        for index in (play.index, fresh):
            for name, held in play.held.items():
                assert {block_hash for _, block_hash in index.blocks(name)} == set(map(block, held))

    asyncio.run(play())
