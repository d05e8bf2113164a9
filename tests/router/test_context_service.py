"""GenerateContext: what gRPC callers may send, and what they get from a fleet."""

import asyncio
import dataclasses
from contextlib import aclosing
from types import SimpleNamespace

import pytest

from headrace.clock import VirtualClock
from headrace.core.request import ContextProgress, GenerationRequest, Piece, RequestId, Revision, SamplingParams
from headrace.errors import (
    DeadlineExceeded,
    Draining,
    HeadraceError,
    InvalidRequest,
    Overloaded,
    Saturated,
    UnknownModel,
)
from headrace.router.config import RouterConfig
from headrace.router.frontend import ServedModel
from headrace.router.service import RouterServicer
from headrace.testing.fleet import open_fleet
from headrace.testing.frontend import ScriptedFrontend, say
from headrace.testing.text import byte_text_model
from headrace.v1 import generate_pb2, router_pb2

CONTEXT = SimpleNamespace(time_remaining=lambda: 30.0, invocation_metadata=lambda: (("x-tenant-id", "a"),))
NUM_CONTEXT_TOKENS = 100


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return byte_text_model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def frontend(text):
    model = ServedModel(name="tiny", max_context_tokens=NUM_CONTEXT_TOKENS, fingerprint="f" * 32, text=text)
    return ScriptedFrontend([model], say("a", "b"))


@pytest.fixture
def servicer(frontend, tmp_path):
    config = RouterConfig(workers=("127.0.0.1:1",), model=tmp_path, max_body_bytes=2_000)
    return RouterServicer(frontend, router_pb2.GetClusterResponse, config, VirtualClock(1000.0))


def opened(*tokens, final=0, max_tokens=0, **fields):
    request = router_pb2.GenerateRequest(model="tiny", tokens=router_pb2.TokenPrompt(token_ids=tokens), **fields)
    request.sampling.max_tokens = max_tokens
    return router_pb2.GenerateContextRequest(open=request, final_tokens=final)


def revised(version, kept=0, tokens=(), *, closed=False, final=0):
    revision = generate_pb2.ContextRevision(
        version=version, kept_tokens=kept, token_ids=tokens, is_closed=closed, final_tokens=final
    )
    return router_pb2.GenerateContextRequest(revision=revision)


async def ask(servicer, *requests):
    async def send():
        for request in requests:
            yield request

    return [response async for response in servicer.GenerateContext(send(), CONTEXT)]


async def test_the_answer_is_that_of_the_closed_prompt(servicer, frontend):
    responses = await ask(servicer, opened(3, 4), revised(1, 1, (5, 6)), revised(2, 2, (7,), closed=True))
    assert [each.WhichOneof("event") for each in responses] == ["progress", "piece", "piece"]
    assert (responses[0].progress.version, responses[0].progress.computed_tokens) == (1, 2)
    assert "".join(each.piece.text for each in responses) == "ab"
    assert responses[1].piece.model == "tiny"
    assert responses[2].piece.usage.prompt_tokens == 3
    [request] = frontend.requests
    assert (request.prompt, request.num_choices, request.tenant) == ((3, 5, 7), 1, "a")


async def test_a_context_may_be_opened_with_nothing(servicer, frontend):
    opening = router_pb2.GenerateContextRequest(open=router_pb2.GenerateRequest(model="tiny"))
    await ask(servicer, opening, revised(1, 0, (7,), closed=True))
    assert frontend.requests[0].prompt == (7,)


@pytest.mark.parametrize(
    ("requests", "field"),
    [
        ([], "open"),
        ([revised(1, 0, (5,))], "open"),
        ([opened(3), opened(3)], "revision"),
        ([opened(3, num_choices=2)], "open"),
        ([router_pb2.GenerateContextRequest(open=router_pb2.GenerateRequest(model="tiny", text="x"))], "open"),
        ([opened(*range(3, 103))], "prompt"),
        ([opened(300)], "prompt"),
        ([opened(3, final=2)], "final_tokens"),
        ([opened(3), revised(2, 1)], "revision.version"),
        ([opened(3), revised(1, 2)], "revision.kept_tokens"),
        ([opened(3, 4, final=2), revised(1, 1)], "revision.kept_tokens"),
        ([opened(3), revised(1, 1, (300,))], "revision.token_ids"),
        ([opened(3), revised(1, 1, (5,) * 99)], "max_tokens"),
        ([opened(3, max_tokens=10), revised(1, 1, (5,) * 90, closed=True)], "max_tokens"),
        ([opened(3), revised(1, 0, (), closed=True)], "revision.is_closed"),
        ([opened(3), revised(1, 1, (5,), final=3)], "final_tokens"),
        ([opened(3), revised(1, 1, (5,) * 2_000)], "prompt"),
    ],
    ids=[
        "nothing",
        "not opened",
        "opened twice",
        "two answers",
        "text",
        "too long at first",
        "no token at first",
        "more stay than there are",
        "a gap",
        "keeps too much",
        "drops what stays",
        "no token",
        "too long",
        "no room for the answer",
        "closed empty",
        "more stay than came",
        "large",
    ],
)
async def test_what_makes_no_sense_is_refused_by_its_name(servicer, requests, field):
    with pytest.raises(InvalidRequest) as caught:
        await ask(servicer, *requests)
    assert caught.value.field == field


# -- A fleet --------------------------------------------------------------------


def request_of(fleet, prompt, **sampling):
    params = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **sampling}
    return GenerationRequest(
        request_id=RequestId(f"r{fleet.next_epoch()}"),
        model="fake",
        prompt=tuple(prompt),
        sampling=SamplingParams(**params),
        deadline_unix_ms=fleet.clock.unix_ms() + 20_000,
    )


async def one_by_one(*revisions, pause_s=0.0):
    for revision in revisions:
        await asyncio.sleep(pause_s)
        yield revision


async def silence():
    await asyncio.Event().wait()
    yield


async def collect(events):
    async with aclosing(events):
        found = [event async for event in events]
    return [each for each in found if isinstance(each, ContextProgress)], [
        each for each in found if isinstance(each, Piece)
    ]


@pytest.mark.parametrize("workers", ["h0", "p0 d0"])
async def test_the_pieces_are_those_of_the_whole_prompt(tmp_path, roles, prompt_of, workers):
    async with open_fleet(tmp_path, roles(workers)) as fleet:
        prompt = prompt_of(1, 30)
        revisions = one_by_one(
            Revision(version=1, num_kept=9, tokens=prompt[9:29]),
            Revision(version=2, num_kept=29, tokens=prompt[29:], is_closed=True),
            pause_s=0.1,
        )
        progress, pieces = await collect(fleet.live.submit_context(request_of(fleet, prompt[:9]), 0, revisions))
        wanted = [piece async for piece in fleet.live.submit(request_of(fleet, prompt))]
        assert "".join(each.text for each in pieces) == "".join(each.text for each in wanted)
        assert (pieces[-1].finish, pieces[-1].usage.prompt_tokens) == (wanted[-1].finish, 30)
        assert pieces[-1].usage.completion_tokens == 8
        assert ContextProgress(version=1, num_computed=28, num_tokens=29) in progress
        await fleet.at_rest()


async def test_a_context_that_is_not_closed_ends_with_an_error_and_leaves_nothing(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        with pytest.raises(InvalidRequest, match="before it was closed"):
            await collect(fleet.live.submit_context(request_of(fleet, prompt_of(1, 9)), 0, one_by_one()))
        await fleet.at_rest()


async def test_an_error_of_whoever_feeds_it_ends_a_context(tmp_path, roles, prompt_of):
    async def fails():
        yield Revision(version=1, num_kept=9, tokens=(5,))
        raise DeadlineExceeded("too slow")

    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        with pytest.raises(DeadlineExceeded, match="too slow"):
            await collect(fleet.live.submit_context(request_of(fleet, prompt_of(1, 9)), 0, fails()))
        await fleet.at_rest()


async def test_there_are_only_so_many_contexts(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        fleet.live._config = dataclasses.replace(fleet.live._config, max_contexts=2)
        events = [fleet.live.submit_context(request_of(fleet, prompt_of(seed, 9)), 0, silence()) for seed in range(2)]
        reading = [asyncio.ensure_future(anext(each)) for each in events]
        await asyncio.wait(reading)
        with pytest.raises(Saturated, match="2 contexts"):
            await collect(fleet.live.submit_context(request_of(fleet, prompt_of(1, 9)), 0, one_by_one()))
        for each in events:
            await each.aclose()
        await fleet.at_rest()
        closed = one_by_one(Revision(version=1, num_kept=9, is_closed=True))
        _, pieces = await collect(fleet.live.submit_context(request_of(fleet, prompt_of(1, 9)), 0, closed))
        assert pieces[-1].finish is not None


async def test_one_tenant_has_only_so_many_contexts(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("h0")) as fleet:
        fleet.live._config = dataclasses.replace(fleet.live._config, max_tenant_contexts=1)
        own = fleet.live.submit_context(request_of(fleet, prompt_of(1, 9)), 0, silence())
        await anext(own)
        with pytest.raises(Overloaded, match="1 contexts of this tenant"):
            await collect(fleet.live.submit_context(request_of(fleet, prompt_of(2, 9)), 0, one_by_one()))
        other = dataclasses.replace(request_of(fleet, prompt_of(2, 9)), tenant="other")
        closed = one_by_one(Revision(version=1, num_kept=9, is_closed=True))
        _, pieces = await collect(fleet.live.submit_context(other, 0, closed))
        assert pieces[-1].finish is not None
        await own.aclose()
        await fleet.at_rest()


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 9])
async def test_a_context_of_which_nothing_comes_is_given_up(tmp_path, roles, prompt_of, num_tokens):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        fleet.live._config = dataclasses.replace(fleet.live._config, context_idle_s=0.2)
        with pytest.raises(DeadlineExceeded, match="nothing came"):
            async with asyncio.timeout(5.0):
                await collect(fleet.live.submit_context(request_of(fleet, prompt_of(1, num_tokens)), 0, silence()))
        await fleet.at_rest()


async def test_a_call_that_says_nothing_is_not_kept(servicer, monkeypatch):
    monkeypatch.setattr("headrace.runtime.incoming.FIRST_REQUEST_S", 0.05)

    async def say_nothing():
        await asyncio.Event().wait()
        yield

    with pytest.raises(DeadlineExceeded, match="no request came"):
        await anext(servicer.GenerateContext(say_nothing(), CONTEXT))


async def test_a_context_for_a_model_that_is_not_served_takes_no_place(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("h0")) as fleet:
        fleet.live._config = dataclasses.replace(fleet.live._config, max_contexts=1)
        wrong = dataclasses.replace(request_of(fleet, prompt_of(1, 9)), model="another")
        for _ in range(2):
            with pytest.raises(UnknownModel):
                await collect(fleet.live.submit_context(wrong, 0, one_by_one()))
        closed = one_by_one(Revision(version=1, num_kept=9, is_closed=True))
        _, pieces = await collect(fleet.live.submit_context(request_of(fleet, prompt_of(1, 9)), 0, closed))
        assert pieces[-1].finish is not None


async def test_a_router_that_leaves_takes_no_context(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("h0")) as fleet:
        fleet.live.is_draining = True
        with pytest.raises(Draining):
            await collect(fleet.live.submit_context(request_of(fleet, prompt_of(1, 9)), 0, one_by_one()))


async def test_revisions_do_not_pile_up_before_a_worker_that_does_not_read(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("h0")) as fleet:
        num_sent = 0

        async def many():
            nonlocal num_sent
            for version in range(1, 5_000):
                await asyncio.sleep(0)
                yield Revision(version=version, num_kept=0, tokens=prompt_of(version % 7, 200))
                num_sent = version

        worker = fleet.workers["h0"]
        worker.lane.stall()
        reading = asyncio.ensure_future(
            collect(fleet.live.submit_context(request_of(fleet, prompt_of(1, 9)), 0, many()))
        )
        await asyncio.sleep(0.5)
        assert 16 <= num_sent < 4_000
        reading.cancel()
        with pytest.raises((asyncio.CancelledError, HeadraceError)):
            await reading
        worker.lane.resume()
        await fleet.at_rest()
