"""A decode worker's verbs: blocks first, then KV, then tokens; who left is refused."""

import asyncio

import pytest

from headrace.core.request import Token
from headrace.core.wire import spec_to_proto, token_to_proto
from headrace.errors import DeadlineExceeded, Draining, InvalidRequest
from headrace.runtime.channels import translate_errors
from headrace.testing.fleet import open_fleet
from headrace.v1 import decode_pb2, decode_pb2_grpc
from headrace.worker.config import WorkerRole

REMOTE, LOCAL = decode_pb2.PREFILL_MODE_REMOTE, decode_pb2.PREFILL_MODE_LOCAL
PROMPT = tuple(range(10, 28))
FIRST = decode_pb2.FirstToken(event=token_to_proto(Token(cursor=0, token_id=5)), cached_tokens=12)


class Bench:
    def __init__(self, fleet):
        self.fleet, self.worker = fleet, fleet.workers["d0"]
        self.stub = decode_pb2_grpc.DecodeServiceStub(fleet.channels.get(self.worker.lane.address))

    def decode(self, spec, mode):
        request = decode_pb2.DecodeRequest(sequence=spec_to_proto(spec), mode=mode)
        return self.stub.Decode(request, timeout=20)

    async def reserve(self, **options):
        call = self.decode(self.fleet.spec(PROMPT, **options), REMOTE)
        return call, (await anext(aiter(call))).reservation.lease

    async def begin(self, lease, writer="w", epoch=None, **origin):
        request = decode_pb2.BeginWriteRequest(
            lease_id=lease.lease_id, epoch=epoch or lease.epoch, writer_id=writer, **origin
        )
        return (await self.stub.BeginWrite(request, timeout=5)).is_accepted

    async def commit(self, lease, writer="w", epoch=None, **outcome):
        request = decode_pb2.CommitPrefillRequest(
            lease_id=lease.lease_id, epoch=epoch or lease.epoch, writer_id=writer, **outcome
        )
        return (await self.stub.CommitPrefill(request, timeout=5)).is_accepted

    async def gone(self):
        await self.fleet.until(lambda: not self.worker.server.num_running, "the stream goes on")


@pytest.fixture
async def bench(tmp_path):
    async with open_fleet(tmp_path, {"d0": WorkerRole.DECODE}) as fleet:
        yield Bench(fleet)
        await fleet.at_rest()


async def read_all(call):
    async with translate_errors("d0"):
        return [event.token_id async for response in call for event in response.tokens.events]


async def test_tokens_follow_the_commit_and_begin_with_the_first_token(bench):
    call, lease = await bench.reserve()
    assert await bench.begin(lease)
    bench.worker.runner.write(tuple(lease.block_ids), PROMPT)
    assert await bench.commit(lease, first_token=FIRST)
    message = (await anext(aiter(call))).tokens
    assert (message.events[0].token_id, message.cached_tokens) == (5, 12)
    assert len(message.events) + len(await read_all(call)) == 8


async def test_a_first_token_that_ends_the_answer_ends_the_stream(bench):
    call, lease = await bench.reserve(max_tokens=1)
    await bench.begin(lease)
    await bench.commit(lease, first_token=FIRST)
    assert await read_all(call) == [5]


async def test_after_a_cancel_nobody_may_write_or_commit(bench):
    call, lease = await bench.reserve()
    call.cancel()
    await bench.gone()
    assert not await bench.begin(lease)
    assert not await bench.commit(lease, first_token=FIRST)


async def test_a_cancel_after_the_begin_keeps_the_blocks_until_the_writer_s_end(bench):
    call, lease = await bench.reserve()
    await bench.begin(lease)
    call.cancel()
    await bench.gone()
    await bench.fleet.until(lambda: not bench.worker.engine.stats().num_running, "the sequence is still there")
    assert bench.worker.engine.stats().leased_blocks == 5
    assert await bench.commit(lease, failure="cancelled")


async def test_a_writer_that_does_not_answer_where_it_says_it_lives_may_not_write(bench):
    """Nobody could ever prove that it has ended, and its blocks would be kept until the deadline."""
    call, lease = await bench.reserve()
    for address, epoch in (("127.0.0.1:1", "gone"), (bench.worker.lane.address, "an earlier life")):
        assert not await bench.begin(lease, writer_address=address, writer_epoch=epoch)
    assert bench.worker.reservations.num_writers() == 0
    assert await bench.begin(lease, writer_address=bench.worker.lane.address, writer_epoch=bench.worker.epoch)
    assert await bench.commit(lease, failure="enough")
    call.cancel()


async def test_a_commit_for_another_epoch_changes_nothing(bench):
    call, lease = await bench.reserve()
    await bench.begin(lease)
    assert not await bench.commit(lease, epoch="e0", first_token=FIRST)
    assert not await bench.commit(lease, epoch="e0", failure="dead")
    assert bench.worker.reservations.num_writers() == 1
    assert await bench.commit(lease, failure="dead")
    call.cancel()


async def test_a_failed_writer_is_succeeded_in_the_same_reservation(bench):
    call, lease = await bench.reserve()
    assert await bench.begin(lease, "first")
    assert not await bench.begin(lease, "second")
    await bench.commit(lease, "first", failure="dead")
    assert await bench.begin(lease, "second")
    assert not await bench.commit(lease, "first", first_token=FIRST)
    assert await bench.commit(lease, "second", first_token=FIRST)
    call.cancel()


async def test_a_prompt_that_never_arrives_ends_with_the_deadline(bench):
    call, _ = await bench.reserve(timeout_s=0.1)
    with pytest.raises(DeadlineExceeded):
        await read_all(call)


async def test_a_local_answer_begins_without_a_reservation(bench):
    call = bench.decode(bench.fleet.spec(PROMPT), LOCAL)
    assert len(await read_all(call)) == 8


async def test_a_mode_that_nobody_knows_is_refused(bench):
    with pytest.raises(InvalidRequest) as caught:
        await read_all(bench.decode(bench.fleet.spec(PROMPT), decode_pb2.PREFILL_MODE_UNSPECIFIED))
    assert caught.value.field == "mode"


async def test_a_draining_worker_refuses_sequences_and_lets_writers_end(bench):
    call, lease = await bench.reserve(max_tokens=2)
    await bench.begin(lease)
    draining = asyncio.ensure_future(bench.worker.server.drain(5))
    await bench.fleet.until(lambda: bench.worker.server.is_draining, "not draining")
    with pytest.raises(Draining):
        await read_all(bench.decode(bench.fleet.spec(PROMPT), LOCAL))
    assert await bench.commit(lease, first_token=FIRST)
    assert len(await read_all(call)) == 2
    assert await draining == 0


async def test_a_finished_answer_is_queued_for_the_kvstore_by_its_full_blocks(bench):
    stored = []
    bench.worker.blocks.store_later = lambda _, hashes: stored.append(hashes)
    await read_all(bench.decode(bench.fleet.spec(PROMPT, max_tokens=6), LOCAL))
    [hashes] = stored
    assert len(hashes) == 6
    assert hashes[:4] == bench.worker.blocks.hashes(PROMPT, b"")
