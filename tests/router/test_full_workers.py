"""A worker without room is passed over; only when nobody has room does the client hear of it."""

import grpc
import pytest

from headrace.decode.service import DecodeServicer
from headrace.engine.messages import HoldWriter, Open
from headrace.errors import Saturated
from headrace.prefill.service import PrefillServicer
from headrace.testing.fleet import open_fleet


def fill(worker, kind=Open, refused=None):
    """Let a worker's engine refuse commands of a kind, as it does when its mailbox is full."""
    send = worker.thread.send

    def refuse(command):
        if isinstance(command, kind):
            if refused is not None:
                refused.append(worker.name)
            raise Saturated("the engine's mailbox is full", limit="1", retry_after_s=3.0)
        send(command)

    worker.thread.send = refuse


def prefer(fleet, name):
    """Make all others of its role look busy, and keep it so."""
    for other in fleet.workers:
        if other[0] == name[0] and other != name:
            fleet.table.reserve(other, "other", 10_000)
            fleet.table.reserve(other, "another", 10_000)
    fleet.table._note = lambda member, load: None


async def answer_of(tmp_path, roles, prompt):
    async with open_fleet(tmp_path, roles("h0")) as fleet:
        return [token.token_id for token in await fleet.tokens(fleet.spec(prompt))]


@pytest.mark.parametrize(
    ("workers", "full"),
    [("h0 h1", "h0"), ("p0 d0 d1", "d0"), ("p0 p1 d0", "p0"), ("p0 d0", "p0"), ("p0 d0", "d0")],
)
async def test_another_worker_is_asked_at_once(tmp_path, roles, prompt_of, workers, full):
    answer = await answer_of(tmp_path, roles, prompt_of(1, 22))
    async with open_fleet(tmp_path, roles(workers)) as fleet:
        refused, suspected = [], []
        prefer(fleet, full)
        fleet.table.suspect = suspected.append
        fill(fleet.workers[full], refused=refused)
        tokens = await fleet.tokens(fleet.spec(prompt_of(1, 22)))
        assert [token.token_id for token in tokens] == answer
        assert refused == [full]
        assert suspected == [], "it is full, not dead"
        await fleet.at_rest()


@pytest.mark.parametrize("workers", ["h0 h1 h2", "p0 d0 d1"])
async def test_when_nobody_has_room_each_was_asked_once_and_the_client_may_retry(tmp_path, roles, prompt_of, workers):
    async with open_fleet(tmp_path, roles(workers)) as fleet:
        refused = []
        for worker in fleet.workers.values():
            fill(worker, refused=refused)
        with pytest.raises(Saturated) as caught:
            await fleet.tokens(fleet.spec(prompt_of(1, 22)))
        assert caught.value.retry_after_s == 3.0
        assert sorted(refused) == sorted(fleet.workers)
        await fleet.at_rest()


async def test_a_decode_worker_that_has_no_room_for_a_writer_is_not_blamed_on_prefill(tmp_path, roles, prompt_of):
    answer = await answer_of(tmp_path, roles, prompt_of(1, 22))
    async with open_fleet(tmp_path, roles("p0 p1 d0 d1")) as fleet:
        refused, ticks = [], []
        prefer(fleet, "d0")
        fill(fleet.workers["d0"], HoldWriter, refused)
        fleet.on_tick = ticks.append
        tokens = await fleet.tokens(fleet.spec(prompt_of(1, 22)))
        assert [token.token_id for token in tokens] == answer
        assert refused == ["d0"]
        assert "d1 Sampled" in ticks
        await fleet.at_rest()


@pytest.mark.parametrize("servicer", [DecodeServicer, PrefillServicer])
async def test_a_server_that_is_out_of_resources_is_a_full_worker(tmp_path, roles, prompt_of, monkeypatch, servicer):
    """gRPC itself says so without our detail; it is no tenant's quota."""
    answer = await answer_of(tmp_path, roles, prompt_of(1, 22))
    calls = []

    async def exhausted(self, request, context):
        calls.append(request)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many streams")
        yield

    async def exhausted_unary(self, request, context):
        calls.append(request)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many streams")

    is_decode = servicer is DecodeServicer
    with monkeypatch.context() as patch:
        patch.setattr(servicer, "Decode" if is_decode else "Prefill", exhausted if is_decode else exhausted_unary)
        async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
            if is_decode:
                with pytest.raises(Saturated) as caught:
                    await fleet.tokens(fleet.spec(prompt_of(1, 22)))
                assert caught.value.retry_after_s == 1.0
                assert len(calls) == 2
            else:
                tokens = await fleet.tokens(fleet.spec(prompt_of(1, 22)))
                assert [token.token_id for token in tokens] == answer
                assert len(calls) == 1
            await fleet.at_rest()
