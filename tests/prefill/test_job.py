"""A prefill job tells the decode worker once that it writes no more, whatever became of it."""

import asyncio

import grpc
import pytest

from headrace.core.wire import spec_to_proto, token_from_proto
from headrace.decode.service import DecodeServicer
from headrace.engine.messages import Begin
from headrace.errors import BlockLost, DeadlineExceeded, InternalError, InvalidRequest, PeerFailed, Saturated
from headrace.prefill.service import PrefillServicer
from headrace.runtime.channels import translate_errors
from headrace.testing.fleet import BLOCK_TOKENS, open_fleet
from headrace.v1 import block_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from headrace.worker.config import WorkerRole

ROLES = {"p0": WorkerRole.PREFILL, "d0": WorkerRole.DECODE}
PROMPT = tuple(range(10, 28))


class Bench:
    """Speaks to both workers as the router does."""

    def __init__(self, fleet):
        self.fleet = fleet
        self.prefill, self.decode = fleet.workers["p0"], fleet.workers["d0"]
        self.prefill_stub = prefill_pb2_grpc.PrefillServiceStub(fleet.channels.get(self.prefill.lane.address))
        self.decode_stub = decode_pb2_grpc.DecodeServiceStub(fleet.channels.get(self.decode.lane.address))

    async def reserve(self, spec):
        """Open a decode stream and return it with its reservation."""
        mode = decode_pb2.PREFILL_MODE_REMOTE
        call = self.decode_stub.Decode(decode_pb2.DecodeRequest(sequence=spec_to_proto(spec), mode=mode), timeout=20)
        return call, (await call.read()).reservation

    async def ask(self, spec, target, writer="w"):
        request = prefill_pb2.PrefillRequest(sequence=spec_to_proto(spec), target=target, writer_id=writer)
        async with translate_errors("p0"):
            return await self.prefill_stub.Prefill(request, timeout=20)

    async def no_writers(self):
        await self.fleet.until(lambda: not self.decode.reservations.num_writers(), "a writer is left")


@pytest.fixture
async def bench(tmp_path):
    async with open_fleet(tmp_path, ROLES, transfer_deadline_s=0.1) as fleet:
        yield Bench(fleet)
        await fleet.at_rest()


async def test_the_hand_over_carries_the_first_token_and_says_what_it_cost(bench):
    spec = bench.fleet.spec(PROMPT)
    call, target = await bench.reserve(spec)
    assert len(target.lease.block_ids) == 5
    response = await bench.ask(spec, target)
    first = (await call.read()).tokens.events[0]
    assert token_from_proto(first).cursor == 0
    assert (response.computed_tokens, response.local_cached_tokens, response.fetched_tokens) == (18, 0, 0)
    assert response.pushed_bytes == 5 * bench.prefill.runner.layout.block_bytes
    call.cancel()


async def test_blocks_that_the_decode_worker_holds_are_not_pushed_again(bench):
    await bench.fleet.tokens(bench.fleet.spec(PROMPT))
    spec = bench.fleet.spec(PROMPT)
    call, target = await bench.reserve(spec)
    assert target.cached_tokens == 16
    response = await bench.ask(spec, target)
    assert response.pushed_bytes == bench.prefill.runner.layout.block_bytes
    assert response.local_cached_tokens == 16
    call.cancel()


async def test_a_lease_of_the_wrong_size_is_refused_and_the_worker_lives(bench):
    """A range error in a task of the worker would end the worker."""
    spec = bench.fleet.spec(PROMPT)
    call, target = await bench.reserve(spec)
    short = prefill_pb2.PrefillTarget()
    short.CopyFrom(target)
    del short.lease.block_ids[3:]
    with pytest.raises(InvalidRequest) as caught:
        await bench.ask(spec, short)
    assert caught.value.field == "target.lease.block_ids"
    await bench.ask(spec, target, "another")
    call.cancel()


async def test_a_bug_while_pushing_fails_the_request_and_not_the_worker(bench):
    async def write(*_):
        raise ValueError("a bug")

    spec = bench.fleet.spec(PROMPT)
    call, target = await bench.reserve(spec)
    good, bench.prefill.connector.write = bench.prefill.connector.write, write
    with pytest.raises(InternalError):
        await bench.ask(spec, target)
    await bench.no_writers()
    bench.prefill.connector.write = good
    await bench.ask(spec, target, "another")
    call.cancel()


async def test_a_reservation_that_is_gone_is_a_lost_block(bench):
    spec = bench.fleet.spec(PROMPT)
    call, target = await bench.reserve(spec)
    call.cancel()
    await bench.fleet.until(lambda: not bench.decode.server.num_running, "the stream goes on")
    with pytest.raises(BlockLost):
        await bench.ask(spec, target)


async def test_a_decode_worker_of_another_life_is_a_failed_peer(bench):
    spec = bench.fleet.spec(PROMPT)
    target = prefill_pb2.PrefillTarget(
        address=bench.decode.lane.address,
        lease=block_pb2.BlockLease(lease_id="l", epoch="of a life before", block_ids=range(5)),
    )
    with pytest.raises(PeerFailed, match="restarted"):
        await bench.ask(spec, target)


async def test_a_failure_frees_the_reservation_for_another_writer(bench):
    spec = bench.fleet.spec(PROMPT)
    call, target = await bench.reserve(spec)
    bench.prefill.runner.failure = ValueError("a bug in the model")
    with pytest.raises(InternalError):
        await bench.ask(spec, target)
    await bench.no_writers()
    await bench.ask(spec, target, "another")
    assert len((await call.read()).tokens.events) > 0
    call.cancel()


async def test_a_full_mailbox_at_begin_fails_the_request_and_frees_everything(bench):
    """Saturated between the reservation and the first step must not leave the pusher waiting."""
    send = bench.prefill.thread.send

    def refuse(command):
        if isinstance(command, Begin):
            raise Saturated("full", retry_after_s=1.0)
        send(command)

    spec = bench.fleet.spec(PROMPT)
    call, target = await bench.reserve(spec)
    bench.prefill.thread.send = refuse
    with pytest.raises(Saturated):
        await bench.ask(spec, target)
    await bench.no_writers()
    bench.prefill.thread.send = send
    call.cancel()


async def test_a_write_past_its_deadline_keeps_the_blocks_held_until_it_has_landed(bench):
    spec = bench.fleet.spec(PROMPT)
    call, target = await bench.reserve(spec)
    bench.fleet.fabric.stall(bench.decode.epoch)
    with pytest.raises(PeerFailed, match="in time"):
        await bench.ask(spec, target)
    call.cancel()
    await bench.fleet.until(lambda: not bench.decode.server.num_running, "the stream goes on")
    assert bench.decode.reservations.num_writers() == 1
    assert bench.decode.engine.stats().leased_blocks == 5
    bench.fleet.fabric.resume(bench.decode.epoch)
    await bench.no_writers()


async def test_a_write_past_the_request_s_own_deadline_is_the_deadline(bench):
    spec = bench.fleet.spec(PROMPT, timeout_s=0.08)
    call, target = await bench.reserve(spec)
    bench.fleet.fabric.stall(bench.decode.epoch)
    with pytest.raises(DeadlineExceeded):
        await bench.ask(spec, target)
    bench.fleet.fabric.resume(bench.decode.epoch)
    await bench.no_writers()
    call.cancel()


async def test_a_cancelled_job_stops_pushing_after_the_write_in_flight(tmp_path):
    """Chunks that wait to be pushed are of no use to anybody any more."""
    async with open_fleet(tmp_path, ROLES) as fleet:
        bench, writes = Bench(fleet), []
        spec = fleet.spec(tuple(range(10, 90)))
        call, target = await bench.reserve(spec)
        fleet.on_tick = lambda tick: writes.append(tick) if tick == "p0 write" else None
        fleet.fabric.stall(bench.decode.epoch)
        asking = asyncio.ensure_future(bench.ask(spec, target))
        await fleet.until(lambda: writes, "nothing was written")
        await fleet.until(lambda: len(bench.prefill.runner.batches) > 3, "no further chunk")
        asking.cancel()
        await asyncio.wait([asking])
        await fleet.until(lambda: any(task.cancelling() for task in asyncio.all_tasks()), "the job goes on")
        assert bench.decode.reservations.num_writers() == 1
        fleet.fabric.resume(bench.decode.epoch)
        await bench.no_writers()
        assert len(writes) == 1
        call.cancel()
        await fleet.at_rest()


async def test_a_commit_that_is_not_answered_in_time_is_the_peer_s_failure(tmp_path, monkeypatch):
    """The request has time left, so it must be one of the errors that send it elsewhere."""
    commit, may_answer = DecodeServicer.CommitPrefill, asyncio.Event()

    async def answer_late(self, request, context):
        await may_answer.wait()
        return await commit(self, request, context)

    monkeypatch.setattr(DecodeServicer, "CommitPrefill", answer_late)
    monkeypatch.setattr("headrace.prefill.delivery.CONTROL_TIMEOUT_S", 0.1)
    async with open_fleet(tmp_path, ROLES) as fleet:
        bench, spec = Bench(fleet), fleet.spec(PROMPT)
        call, target = await bench.reserve(spec)
        with pytest.raises(PeerFailed, match="in time"):
            await bench.ask(spec, target)
        may_answer.set()
        bench.decode.reservations.end_write("w")
        call.cancel()
        await fleet.at_rest()


async def test_nothing_is_written_after_the_lease_has_ended(bench):
    """When it hears nothing of a writer, the decode worker takes the blocks back by this clock."""
    writes = []
    bench.fleet.on_tick = lambda tick: writes.append(tick) if tick == "p0 write" else None
    spec = bench.fleet.spec(PROMPT)
    call, target = await bench.reserve(spec)
    target.lease.deadline_unix_ms = bench.fleet.clock.unix_ms()
    with pytest.raises(PeerFailed):
        await bench.ask(spec, target)
    assert writes == []
    await bench.no_writers()
    call.cancel()


async def test_a_report_that_gets_lost_is_repeated(tmp_path, monkeypatch):
    commit, lost = DecodeServicer.CommitPrefill, []

    async def lose_two(self, request, context):
        if len(lost) < 2:
            lost.append(request)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "lost on the way")
        return await commit(self, request, context)

    monkeypatch.setattr(DecodeServicer, "CommitPrefill", lose_two)
    monkeypatch.setattr("headrace.prefill.delivery.REPORT_PAUSES_S", (0.0, 0.01, 0.01))
    async with open_fleet(tmp_path, ROLES) as fleet:
        bench, spec = Bench(fleet), fleet.spec(PROMPT)
        call, target = await bench.reserve(spec)
        bench.prefill.runner.failure = ValueError("a bug in the model")
        with pytest.raises(InternalError):
            await bench.ask(spec, target)
        await fleet.until(lambda: len(lost) == 2, "not repeated")
        await bench.no_writers()
        call.cancel()
        await fleet.at_rest()


async def test_pushing_whole_pushes_once(bench, monkeypatch):
    writes = []
    bench.fleet.on_tick = lambda tick: writes.append(tick) if tick == "p0 write" else None
    spec = bench.fleet.spec(PROMPT)
    answer = await bench.fleet.tokens(bench.fleet.spec(PROMPT))
    num_chunked = len(writes)
    writes.clear()
    whole = {name: getattr(bench.prefill.prefill, name) for name in type(bench.prefill.prefill).__slots__}
    parts = type(bench.prefill.prefill)(**{**whole, "push_whole": True})
    call, target = await bench.reserve(spec)
    request = prefill_pb2.PrefillRequest(sequence=spec_to_proto(spec), target=target, writer_id="w")
    await PrefillServicer(parts).Prefill(request, None)
    assert num_chunked >= 1
    assert len(writes) == 1
    assert (await call.read()).tokens.events[0].token_id == answer[0].token_id
    call.cancel()


async def test_two_sequences_of_one_name_do_not_end_each_other(bench):
    spec = bench.fleet.spec(PROMPT)
    call, target = await bench.reserve(spec)
    held = bench.fleet.hold_at("p0 Progress", 1)
    first = asyncio.ensure_future(bench.ask(spec, target))
    await held.wait()
    with pytest.raises(InvalidRequest):
        await bench.ask(spec, target, "another")
    bench.prefill.runner.gate.set()
    await first
    assert BLOCK_TOKENS * len(target.lease.block_ids) >= len(PROMPT)
    call.cancel()
