"""Publishers and replicas around a real server."""

import asyncio

import pytest

from headrace.clock import WallClock
from headrace.core.placement import Origin, Provenance, Tier
from headrace.index.connection import RedisConfig, connect
from headrace.index.events import Change, ChangeKind
from headrace.index.log import IndexLog, Lifetime, Written
from headrace.index.prefix_index import PrefixIndex
from headrace.index.publisher import IndexPublisher
from headrace.index.replica import IndexReplica
from headrace.testing.index import SimpleIndex
from headrace.testing.index_log import block, removed, running, stored, until
from headrace.testing.redis import redis_server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def redis(server):
    client = connect(RedisConfig(url=server.url))
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def log(redis):
    return IndexLog(redis)


def life(location="w1", epoch="a", started=1):
    return Lifetime(location=location, epoch=epoch, started_unix_ms=started)


def publisher_of(log, **kwargs):
    return IndexPublisher(log, life(**kwargs), WallClock())


def replica_of(log, **kwargs):
    index = SimpleIndex()
    return index, IndexReplica(log, index, WallClock(), wait_s=0.2, **kwargs)


def numbers_of(index, location="w1", tier=Tier.DEVICE):
    held = index.blocks(location) or {}
    return {int.from_bytes(block_hash, "big") for held_tier, block_hash in held if held_tier is tier}


async def test_two_publishers_and_two_replicas_converge(log):
    publishers = [publisher_of(log, location=name) for name in ("w1", "w2")]
    (index_a, replica_a), (index_b, replica_b) = replica_of(log), replica_of(log)
    async with running(*(part.run() for part in (*publishers, replica_a, replica_b))):
        publishers[0].note([stored(range(10))])
        publishers[1].note([stored(range(5, 15), Tier.DRAM), removed([7], Tier.DRAM)])
        publishers[0].note([removed([3])])
        for index in (index_a, index_b):
            await until(lambda index=index: numbers_of(index) == set(range(10)) - {3})
            await until(lambda index=index: numbers_of(index, "w2", Tier.DRAM) == set(range(5, 15)) - {7})
        await until(lambda: replica_a.state().is_synced)
        await until(lambda: publishers[0].is_current)
    assert [location.name for location in replica_a.state().locations] == ["w1", "w2"]


async def step_until_current(*parts):
    for _ in range(5):
        for part in parts:
            if isinstance(part, IndexReplica):
                await part.step(0.0)
            else:
                await part.step()


async def test_a_reborn_locations_old_blocks_vanish_in_one_write(log):
    old = publisher_of(log)
    old.note([stored(range(1000))])
    index, replica = replica_of(log)
    await step_until_current(old, replica)
    assert len(numbers_of(index)) == 1000

    assert await log.begin(life(epoch="b", started=2), 0) is Written.DONE
    await replica.step(0.0)

    assert index.blocks("w1") == {}


async def test_a_zombie_of_an_earlier_lifetime_is_fenced_and_stops(log):
    zombie, reborn = publisher_of(log), publisher_of(log, epoch="b", started=2)
    index, replica = replica_of(log)
    zombie.note([stored([1])])
    await step_until_current(zombie)
    reborn.note([stored([2])])
    await step_until_current(reborn)

    zombie.note([stored([3])])
    await zombie.run()
    await step_until_current(replica)

    assert zombie.is_fenced
    assert "later lifetime" in zombie.problem
    assert await log.begin(life(), 7) is Written.FENCED
    assert await log.leave(life()) is Written.FENCED
    assert numbers_of(index) == {2}


async def test_a_fresh_replica_needs_the_snapshot_and_what_follows_it(redis):
    log = IndexLog(redis, keep_s=0)
    publisher = IndexPublisher(log, life(), WallClock(), least_snapshot_bytes=2000)
    await publisher.step()
    for number in range(130):
        publisher.note([stored([number])])
        await publisher.step()

    index, replica = replica_of(log)
    await step_until_current(replica)

    assert numbers_of(index) == set(range(130))
    assert index.num_restores == 1
    assert 0 < replica.state().num_events < 128
    assert await redis.xlen("{headrace:index}:log") < 128


async def test_a_silent_location_pins_the_stream_only_until_it_folds(redis):
    class Shifted(WallClock):
        shift_s = 0.0

        def now(self):
            return super().now() + self.shift_s

    clock = Shifted()
    log = IndexLog(redis, keep_s=0)
    silent = IndexPublisher(log, life(), clock)
    silent.note([stored([1])])
    await step_until_current(silent)
    assert await redis.xlen("{headrace:index}:log") == 2

    clock.shift_s = 61.0
    await silent.step()

    assert await redis.xlen("{headrace:index}:log") == 1
    index, replica = replica_of(log)
    await step_until_current(replica)
    assert numbers_of(index) == {1}


async def test_the_last_event_may_be_repeated_and_no_other(log):
    await log.begin(life(), 0)
    assert await log.append(life(), 1, b"") is Written.DONE
    assert await log.append(life(), 1, b"") is Written.DONE
    assert await log.append(life(), 3, b"") is Written.RESYNC
    assert await log.append(life(), 2, b"") is Written.DONE
    assert await log.append(life(), 1, b"") is Written.RESYNC
    assert await log.touch(life(), 2) is Written.RESYNC
    assert await log.snapshot(life(), 2, []) is Written.RESYNC


async def test_a_location_that_the_log_has_lost_registers_again_with_all_it_holds(log, redis):
    publisher, (index, replica) = publisher_of(log), replica_of(log)
    publisher.note([stored([1, 2])])
    await step_until_current(publisher, replica)
    await redis.hdel("{headrace:index}:lives", "w1")

    publisher.note([stored([3])])
    await step_until_current(publisher, replica)

    assert publisher.num_resyncs == 1
    assert replica.state().num_gaps == 1
    assert numbers_of(index) == {1, 2, 3}


async def test_a_missing_event_is_made_up_for_by_the_next_snapshot(log, redis):
    publisher = IndexPublisher(log, life(), WallClock(), least_snapshot_bytes=100)
    await publisher.step()
    for number in (1, 2):
        publisher.note([stored([number])])
        await publisher.step()
    first_event = (await redis.xrange("{headrace:index}:log"))[1][0]
    await redis.xdel("{headrace:index}:log", first_event)
    index, replica = replica_of(log)
    await step_until_current(replica)
    assert replica.state().locations[0].is_resyncing

    publisher.note([stored(range(3, 20))])
    await step_until_current(publisher, replica)

    assert numbers_of(index) == set(range(1, 20))
    assert not replica.state().locations[0].is_resyncing


async def test_the_last_of_several_changes_of_a_block_counts(log):
    publisher, (index, replica) = publisher_of(log), replica_of(log)
    decoded = Origin(provenance=Provenance.DECODED)
    publisher.note([stored([1, 2]), removed([1]), stored([2], origin=decoded), stored([3], Tier.DISK)])
    await step_until_current(publisher, replica)
    assert index.blocks("w1") == {(Tier.DEVICE, block(2)): decoded, (Tier.DISK, block(3)): Origin()}
    assert publisher.num_published == 1


async def test_more_changes_than_are_kept_end_in_a_snapshot(log, monkeypatch):
    monkeypatch.setattr("headrace.index.publisher.MAX_PENDING", 100)
    monkeypatch.setattr("headrace.index.publisher.PART_BLOCKS", 64)
    publisher, (index, replica) = publisher_of(log), replica_of(log)
    publisher.note([stored(range(60)), removed(range(30))])
    publisher.note([stored(range(100, 500))])
    await step_until_current(publisher, replica)
    assert numbers_of(index) == {*range(30, 60), *range(100, 500)}
    assert publisher.num_published == 0


async def test_every_replica_is_told_of_a_quarantined_block(log):
    seen = []
    publishers = [publisher_of(log, location=name) for name in ("w1", "w2")]
    index, replica = replica_of(log, on_quarantine=seen.append)
    for publisher in publishers:
        publisher.note([stored([1, 2])])
    await step_until_current(*publishers, replica)

    publishers[0].note([Change(kind=ChangeKind.QUARANTINED, tier=Tier.DEVICE, hashes=(block(1),))])
    await step_until_current(publishers[0], replica)

    assert seen == [(block(1),)]
    assert numbers_of(index) == numbers_of(index, "w2") == {2}
    assert publishers[0].num_blocks == 1


def distrusting(number):
    return Change(kind=ChangeKind.QUARANTINED, tier=Tier.DEVICE, hashes=(block(number),))


async def test_a_replica_that_was_cut_off_while_the_stream_was_trimmed_hears_what_was_quarantined(redis):
    log, seen = IndexLog(redis, keep_s=0), []
    publisher = IndexPublisher(log, life(), WallClock(), least_snapshot_bytes=1)
    _, replica = replica_of(log, on_quarantine=seen.append)
    publisher.note([stored([1, 2])])
    await step_until_current(publisher, replica)

    publisher.note([distrusting(1)])
    await step_until_current(publisher)
    publisher.note([stored(range(10, 20))])
    await step_until_current(publisher)
    assert (await log.state()).trimmed > replica._position

    await step_until_current(replica)
    assert seen == [(block(1),)]


async def test_what_was_quarantined_between_a_gap_and_the_snapshot_that_closes_it_is_heard(redis):
    log, seen = IndexLog(redis), []
    publisher = IndexPublisher(log, life(), WallClock(), least_snapshot_bytes=1)
    _, replica = replica_of(log, on_quarantine=seen.append)
    publisher.note([stored([1, 2])])
    await step_until_current(publisher, replica)

    publisher._must_resync = True
    await publisher.step()
    publisher.note([distrusting(1)])
    await step_until_current(publisher)
    publisher.note([stored(range(10, 20))])
    await step_until_current(publisher)

    await step_until_current(replica)
    assert replica.state().num_gaps == 1
    assert (block(1),) in seen


async def test_what_was_quarantined_before_redis_lost_its_memory_is_told_again(redis, log):
    seen = []
    publisher = publisher_of(log)
    _, replica = replica_of(log, on_quarantine=seen.append)
    publisher.note([stored([1, 2])])
    await step_until_current(publisher, replica)
    publisher.note([distrusting(1)])
    await step_until_current(publisher)

    await redis.flushall()
    await step_until_current(publisher)
    await step_until_current(replica)

    assert (block(1),) in seen


async def test_the_log_remembers_the_blocks_that_were_quarantined_last(redis, monkeypatch):
    monkeypatch.setattr("headrace.index.log.MOST_QUARANTINED", 3)
    log = IndexLog(redis)
    publisher = publisher_of(log)
    for number in range(5):
        publisher.note([distrusting(number)])
        await step_until_current(publisher)
    assert await log.quarantined() == tuple(map(block, (2, 3, 4)))


async def test_a_location_that_leaves_is_gone_at_once(log):
    publisher, (index, replica) = publisher_of(log), replica_of(log)
    publisher.note([stored([1])])
    await step_until_current(publisher, replica)
    await publisher.leave()
    await replica.step(0.0)
    assert index.blocks("w1") is None
    assert replica.state().locations == ()


async def test_a_location_that_is_silent_for_long_is_removed_by_another(redis):
    log = IndexLog(redis, forget_after_s=0.2)
    silent, other = life("w1"), life("w2")
    index, replica = replica_of(log)
    await log.begin(silent, 0)
    await log.begin(other, 0)
    await replica.step(0.0)
    await replica.step(0.0)
    assert set(index.held) == {"w1", "w2"}
    async with asyncio.timeout(5):
        while "w1" in index.held:
            await log.touch(other, 1)
            await replica.step(0.0)
            await asyncio.sleep(0.005)
    assert set(index.held) == {"w2"}
    assert await log.touch(silent, 1) is Written.RESYNC


async def test_nobody_is_removed_for_a_silence_that_was_everybodys(redis):
    log = IndexLog(redis, forget_after_s=0.1)
    await log.begin(life("w1"), 0)
    await log.begin(life("w2"), 0)
    await asyncio.sleep(0.12)
    assert await log.touch(life("w2"), 1) is Written.DONE
    assert await log.touch(life("w1"), 1) is Written.DONE


async def test_an_idle_replica_and_publisher_hardly_ask(server, redis, log):
    publisher, (_, replica) = publisher_of(log), replica_of(log)
    async with running(publisher.run(), replica.run()):
        await until(lambda: publisher.is_current and replica.state().is_synced)
        before = await asked(redis)
        await asyncio.sleep(0.3)
        after = await asked(redis)
    # The read under way and the next one, and at most one sign of life.
    assert after["xread"] - before["xread"] <= 2
    assert after["evalsha"] - before["evalsha"] <= 1


async def asked(redis):
    """Return how often each command was called by clients or scripts."""
    stats = await redis.info("commandstats")
    return {name: stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("xread", "evalsha")}


async def test_what_somebody_else_wrote_into_the_stream_is_left_out(redis, log):
    (index, replica), publisher = replica_of(log), publisher_of(log)
    publisher.note([stored([1])])
    await publisher.step()
    await redis.xadd("{headrace:index}:log", {"location": b"\xff\xfe", "event": b"x"})
    await redis.hset("{headrace:index}:lives", b"\xff", b"x")
    publisher.note([stored([2])])
    await publisher.step()
    await publisher.step()
    for _ in range(4):
        await replica.step(0.0)
    (held,) = index.held.values()
    assert {name for _, name in held.blocks} == {block(1), block(2)}


async def test_locations_beyond_the_bound_are_left_out_and_the_others_are_followed(log):
    index = PrefixIndex(budget_bytes=1 << 20, max_locations=1)
    replica = IndexReplica(log, index, WallClock())
    for name in ("a", "b"):
        publisher = IndexPublisher(log, Lifetime(location=name, epoch="e", started_unix_ms=1), WallClock())
        publisher.note([stored([1])])
        for _ in range(2):
            await publisher.step()
        await replica.step(0.0)
    for _ in range(4):
        await replica.step(0.0)
    assert [state.name for state in index.locations()] == ["a"]
    assert index.match([block(1)])[0].location == "a"
