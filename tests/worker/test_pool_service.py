"""A worker lends its cached blocks: by real calls and engines, with a fake model and transport."""

import asyncio

import pytest

from headrace.core.block import block_hashes, root_hash
from headrace.core.digest import block_digest
from headrace.core.request import SequenceId
from headrace.engine.messages import Goal, Sampled
from headrace.errors import BlockLost, DeadlineExceeded, Draining, InvalidRequest, PeerMismatch
from headrace.runtime.channels import translate_errors
from headrace.testing.fleet import BLOCK_TOKENS, FINGERPRINT, open_fleet
from headrace.v1 import pool_pb2, pool_pb2_grpc
from headrace.worker.config import WorkerRole

PROMPT = tuple(range(3, 3 + 3 * BLOCK_TOKENS + 1))
HASHES = block_hashes(root_hash(FINGERPRINT), PROMPT, BLOCK_TOKENS)


class Loan:
    """An owner whose cache holds a prefix, and a reader that asks for it as a worker does."""

    def __init__(self, fleet):
        self.fleet = fleet
        self.owner, self.reader = fleet.workers["h0"], fleet.workers["h1"]
        self.stub = pool_pb2_grpc.PoolServiceStub(fleet.channels.get(self.owner.lane.address))

    async def fill(self):
        async with self.owner.engine.open(self.fleet.spec(PROMPT, max_tokens=1), Goal.ANSWER) as sequence:
            sequence.begin(0)
            while not any(isinstance(event, Sampled) for event in await sequence.events()):
                pass
        await self.fleet.at_rest("h0")
        self.before = self.states()

    def states(self):
        stats = self.owner.engine.stats()
        return stats.free_blocks, stats.cached_blocks, stats.leased_blocks, stats.num_leases

    async def acquire(self, hashes=HASHES, *, seconds=10.0, fingerprint=FINGERPRINT, patience_s=5.0):
        request = self.request(hashes, seconds=seconds, fingerprint=fingerprint)
        async with translate_errors("h0"):
            return (await self.stub.AcquireGet(request, timeout=patience_s)).lease

    def request(self, hashes, *, seconds=10.0, fingerprint=FINGERPRINT):
        return pool_pb2.AcquireGetRequest(
            block_hashes=hashes,
            model_fingerprint=fingerprint,
            reader="h1",
            reader_epoch=self.reader.epoch,
            deadline_unix_ms=self.fleet.clock.unix_ms() + int(seconds * 1000),
            tenant="acme",
        )

    async def release(self, lease, **changes):
        fields = {"lease_id": lease.lease_id, "epoch": lease.epoch, "tenant": "acme", **changes}
        async with translate_errors("h0"):
            await self.stub.ReleaseGet(pool_pb2.ReleaseGetRequest(**fields), timeout=5.0)

    async def report(self, block_hash):
        async with translate_errors("h0"):
            request = pool_pb2.ReportCorruptRequest(block_hash=block_hash, reader="h1", tenant="acme")
            return (await self.stub.ReportCorrupt(request, timeout=5.0)).is_quarantined

    async def leases(self):
        return (await self.stub.ListLeases(pool_pb2.ListLeasesRequest(), timeout=5.0)).leases

    async def read(self, lease, local_ids):
        peer = await self.reader.peers.ensure(self.owner.lane.address, lease.epoch)
        deadline_s = self.fleet.clock.now() + 5.0
        await self.reader.connector.read(peer.pool.agent_name, local_ids, lease.block_ids, deadline_s)

    async def until_as_before(self):
        await self.fleet.until(lambda: self.states() == self.before, f"{self.states()} is not {self.before}")


@pytest.fixture
async def loan(tmp_path):
    async with open_fleet(tmp_path, {"h0": WorkerRole.HYBRID, "h1": WorkerRole.HYBRID}) as fleet:
        loan = Loan(fleet)
        await loan.fill()
        yield loan
        for worker in fleet.workers.values():
            worker.thread.stop()
            worker.thread._engine._cache.ledger.verify()


async def test_a_worker_reads_the_cached_prefix_of_another_and_leaves_its_ledger_as_it_was(loan):
    lease = await loan.acquire()
    assert len(lease.block_ids) == 3
    assert lease.epoch == loan.owner.epoch
    local = [20, 21, 22]
    await loan.read(lease, local)
    assert (loan.reader.runner.blocks[local] == loan.owner.runner.blocks[list(lease.block_ids)]).all()
    await loan.release(lease)
    await loan.until_as_before()
    assert not await loan.leases()


async def test_leased_blocks_are_not_reused_while_they_are_read(loan):
    lease = await loan.acquire()
    content = loan.owner.runner.blocks[list(lease.block_ids)].copy()
    num_others = loan.fleet.shape.num_blocks - 3
    filler = loan.fleet.spec(tuple(100 + n % 100 for n in range(num_others * BLOCK_TOKENS - 1)), max_tokens=1)
    async with loan.owner.engine.open(filler, Goal.ANSWER) as sequence:
        assert not set(lease.block_ids) & set(sequence.admitted.block_ids)
        num_leased = loan.fleet.shape.num_blocks
        await loan.fleet.until(lambda: loan.owner.engine.stats().leased_blocks == num_leased, "blocks not leased")
    assert (loan.owner.runner.blocks[list(lease.block_ids)] == content).all()
    await loan.release(lease)


async def test_the_lease_of_a_reader_that_died_ends_by_the_clock(loan):
    lease = await loan.acquire(seconds=0.3)
    assert len(lease.block_ids) == 3
    await loan.reader.kill()
    await loan.until_as_before()
    with pytest.raises(BlockLost):
        await loan.release(lease)


async def test_a_caller_that_gives_up_while_the_engine_is_busy_leaves_no_lease(loan):
    runner = loan.owner.runner
    async with loan.owner.engine.open(loan.fleet.spec((8, 8), max_tokens=1), Goal.ANSWER) as sequence:
        runner.gate.clear()
        runner.entered.clear()
        sequence.begin(0)
        await asyncio.to_thread(runner.entered.wait, 5.0)
        with pytest.raises(DeadlineExceeded):
            await loan.acquire(seconds=60.0, patience_s=0.1)
        runner.gate.set()
    await loan.until_as_before()


@pytest.mark.parametrize(
    "forged",
    [{"tenant": "other"}, {"epoch": "h0-before"}, {"lease_id": "0" * 32}],
    ids=["another tenant", "an earlier process", "a guessed lease"],
)
async def test_nobody_else_can_end_a_lease(loan, forged):
    lease = await loan.acquire()
    with pytest.raises(BlockLost):
        await loan.release(lease, **forged)
    assert loan.states() != loan.before
    await loan.release(lease)
    await loan.until_as_before()


async def test_a_lease_carries_the_digests_that_the_blocks_had_when_they_were_first_lent(loan):
    first = await loan.stub.AcquireGet(loan.request(HASHES), timeout=5.0)
    layout, blocks = loan.owner.runner.layout, loan.owner.runner.blocks
    assert list(first.digests) == [block_digest(blocks[block], layout) for block in first.lease.block_ids]
    blocks[first.lease.block_ids[1], 3] ^= 1
    again = await loan.stub.AcquireGet(loan.request(HASHES), timeout=5.0)
    assert again.digests == first.digests
    for lease in (first.lease, again.lease):
        await loan.release(lease)


async def test_handles_are_long_and_never_the_same(loan):
    leases = [await loan.acquire() for _ in range(3)]
    assert {len(lease.lease_id) for lease in leases} == {32}
    assert len({lease.lease_id for lease in leases}) == 3
    for lease in leases:
        await loan.release(lease)
    await loan.until_as_before()


async def test_what_is_not_cached_is_a_miss(loan):
    other = block_hashes(root_hash(FINGERPRINT, b"key of another tenant"), PROMPT, BLOCK_TOKENS)
    assert (await loan.acquire(other)).lease_id == ""
    assert len((await loan.acquire([*HASHES, *other], seconds=0.2)).block_ids) == 3
    await loan.until_as_before()


async def test_blocks_of_another_model_are_refused(loan):
    with pytest.raises(PeerMismatch, match="another-model"):
        await loan.acquire(fingerprint="another-model")


async def test_a_hash_of_the_wrong_size_is_refused(loan):
    with pytest.raises(InvalidRequest, match="16 bytes"):
        await loan.acquire([b"x"])
    with pytest.raises(InvalidRequest, match="16 bytes"):
        await loan.report(b"x")


async def test_a_worker_that_leaves_lends_nothing_but_takes_back(loan):
    lease = await loan.acquire()
    await loan.owner.server.drain(0.0)
    with pytest.raises(Draining):
        await loan.acquire()
    await loan.release(lease)
    await loan.until_as_before()


async def test_a_block_reported_as_corrupt_is_found_no_more_by_anybody(loan):
    lease = await loan.acquire()
    assert await loan.report(HASHES[1])
    assert not await loan.report(HASHES[1])
    await loan.release(lease)
    assert len((await loan.acquire(seconds=0.2)).block_ids) == 1
    free, cached, leased, leases = loan.before
    loan.before = (free + 1, cached - 1, leased, leases)
    await loan.until_as_before()


async def test_the_list_shows_readers_sequences_and_writers_but_no_usable_handle(loan):
    lease = await loan.acquire()
    spec = loan.fleet.spec((7, 7, 7, 7, 7))
    async with loan.owner.engine.open(spec, Goal.ANSWER) as sequence:
        loan.owner.engine.hold_writer("write-1", sequence.admitted.block_ids)
        reports = {report.owner: report for report in await loan.leases()}
        loan.owner.engine.release_writer("write-1")
    read, own, writer = reports["read"], reports[SequenceId(spec.sequence_id)], reports[""]
    assert (read.reader, read.epoch, read.num_blocks, read.is_writer) == ("h1", loan.reader.epoch, 3, False)
    assert 0 < read.remaining_ms <= 10_000
    assert len(read.lease) == 8
    assert (own.num_blocks, own.is_writer, own.HasField("remaining_ms")) == (2, False, False)
    assert (writer.lease, writer.num_blocks, writer.is_writer) == ("write-1", 2, True)
    await loan.release(lease)
    await loan.until_as_before()
