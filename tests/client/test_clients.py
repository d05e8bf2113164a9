"""What a caller of either client sees, over real gRPC on loopback."""

import asyncio
import time

import pytest

from headrace import (
    AsyncClient,
    Cancelled,
    DeadlineExceeded,
    Draining,
    FinishReason,
    InternalError,
    InvalidRequest,
    MemberInfo,
    ModelInfo,
    Overloaded,
    PeerFailed,
    Piece,
    Saturated,
)
from headrace.testing.router import Act, ScriptedRouter, answer, serve_router

FULL = Saturated("full", retry_after_s=0.001)


async def wait_for(event):
    async with asyncio.timeout(5):
        await event.wait()


async def test_an_answer_is_folded_from_its_pieces(connect):
    async with serve_router(ScriptedRouter(answer("hello"))) as server, connect(server.address) as client:
        got = await client.generate("hi")
    assert (got.text, got.token_ids, got.finish) == ("hello", tuple(map(ord, "hello")), FinishReason.STOP)
    assert (got.model, got.request_id) == ("scripted", "made-up")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.cached_tokens) == (3, 5, 1)
    assert 0 < got.ttft_s <= got.total_s
    assert got.tokens_per_s > 0
    assert got.choices[0].tokens[0].logprob == -0.5


async def test_the_choices_of_one_call_are_kept_apart(connect):
    first, second = answer("ab", 0, is_last=False), answer("xyz", 1)
    router = ScriptedRouter([second[0], first[0], first[1], *second[1:]])
    async with serve_router(router) as server, connect(server.address) as client:
        got = await client.generate("hi", n=2)
    assert [choice.text for choice in got.choices] == ["ab", "xyz"]


async def test_a_client_names_its_tenant_and_a_call_its_scope(connect):
    router = ScriptedRouter(answer("x"))
    async with serve_router(router) as server:
        async with connect(server.address, tenant="team-a") as client:
            await client.generate("hi", cache_scope="public")
        async with connect(server.address) as client:
            await client.chat([{"role": "user", "content": "hi"}])
    assert router.tenants == ["team-a", None]
    assert [request.cache_scope for request in router.requests] == ["public", ""]


async def test_a_client_of_no_possible_tenant_is_refused(connect):
    with pytest.raises(InvalidRequest, match="x-tenant-id must be"):
        async with connect("127.0.0.1:1", tenant="a b"):
            pass


async def test_a_chat_carries_its_messages_and_options(connect):
    router = ScriptedRouter(answer("x"))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    async with serve_router(router) as server, connect(server.address) as client:
        await client.chat(messages, temperature=0, max_tokens=7, stop="END", seed=-1, request_id="r1", top_k=-1)
    [request] = router.requests
    assert [(message.role, message.content) for message in request.chat.messages] == [
        ("system", "be brief"),
        ("user", "hi"),
    ]
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0, 7)
    assert request.sampling.seed == 2**64 - 1
    assert not request.sampling.HasField("top_k")
    assert (list(request.stop), request.request_id) == (["END"], "r1")


async def test_a_stream_gives_pieces_and_then_the_answer(connect):
    async with serve_router(ScriptedRouter(answer("abc"))) as server, connect(server.address) as client:
        async with client.stream([1, 2]) as stream:
            pieces = [piece async for piece in stream]
            got = await stream.answer()
    assert [piece.text for piece in pieces] == ["a", "b", "c"]
    assert pieces[-1].finish is FinishReason.STOP
    assert pieces[-1].usage == got.usage
    assert got.text == "abc"


async def test_leaving_a_stream_early_stops_the_work(connect):
    router = ScriptedRouter([*answer("ab", is_last=False)[:1], Act.HANG])
    async with serve_router(router) as server, connect(server.address) as client:
        async with client.stream_chat([{"role": "user", "content": "hi"}]) as stream:
            async for _ in stream:
                break
        await wait_for(router.left)
    assert router.num_left == 1


async def test_cancelling_a_call_stops_the_work():
    router = ScriptedRouter([Act.HANG])
    async with serve_router(router) as server, AsyncClient(server.address) as client:
        calling = asyncio.ensure_future(client.generate("hi"))
        await wait_for(router.arrived)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await wait_for(router.left)


async def test_no_room_is_tried_again_until_there_is(connect):
    router = ScriptedRouter([FULL], [Draining("leaving")], [PeerFailed("died")], answer("ok"))
    async with serve_router(router) as server, connect(server.address) as client:
        assert (await client.generate("hi")).text == "ok"
    assert len(router.requests) == 4


async def test_retries_are_bounded(connect):
    router = ScriptedRouter([FULL])
    async with serve_router(router) as server, connect(server.address, retries=1) as client:
        with pytest.raises(Saturated):
            await client.generate("hi")
    assert len(router.requests) == 2


@pytest.mark.parametrize(
    "error", [InvalidRequest("no"), DeadlineExceeded("late"), InternalError("bug"), Overloaded("quota")]
)
async def test_what_a_retry_cannot_help_is_raised_at_once(connect, error):
    router = ScriptedRouter([error], answer("ok"))
    async with serve_router(router) as server, connect(server.address) as client:
        with pytest.raises(type(error)):
            await client.generate("hi")
    assert len(router.requests) == 1


async def test_nothing_is_tried_again_once_a_piece_has_arrived(connect):
    router = ScriptedRouter([*answer("ab")[:1], FULL], answer("ok"))
    async with serve_router(router) as server, connect(server.address) as client:
        stream = client.stream("hi")
        assert (await anext(stream)).text == "a"
        with pytest.raises(Saturated):
            await anext(stream)
    assert len(router.requests) == 1


async def test_a_deadline_is_carried_to_the_router_and_ends_the_call(connect):
    router = ScriptedRouter([Act.HANG])
    async with serve_router(router) as server, connect(server.address, timeout_s=100) as client:
        begun_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await client.generate("hi", timeout_s=0.2)
        assert time.monotonic() - begun_s < 5
        await wait_for(router.left)
    # gRPC rounds up to whole milliseconds: over a warm connection 6 of 10 calls have more than 0.2 s left.
    assert 0 < router.remaining_s[0] <= 0.201


async def test_a_wait_that_outlasts_the_deadline_is_not_begun(connect):
    router = ScriptedRouter([Saturated("full", retry_after_s=60)])
    async with serve_router(router) as server, connect(server.address) as client:
        with pytest.raises(Saturated):
            await client.generate("hi", timeout_s=5)


async def test_a_router_that_is_not_there_is_a_failed_peer(connect, free_port):
    async with connect(f"127.0.0.1:{free_port}", retries=0) as client:
        with pytest.raises(PeerFailed):
            await client.models()
        with pytest.raises(PeerFailed):
            await client.generate("hi")


async def test_a_router_that_comes_up_late_is_waited_for(connect, free_port):
    async with connect(f"127.0.0.1:{free_port}", retries=20) as client, asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(client.generate("hi"))
        await asyncio.sleep(0.05)
        async with serve_router(ScriptedRouter(answer("ok")), port=free_port):
            assert (await asking).text == "ok"


async def test_a_stream_that_ends_before_its_answer_is_a_bug(connect):
    async with serve_router(ScriptedRouter(answer("ab")[:1])) as server, connect(server.address) as client:
        with pytest.raises(InternalError, match="ended before"):
            await client.generate("hi")


async def test_a_call_under_which_the_client_is_closed_is_cancelled(connect):
    router = ScriptedRouter([Act.HANG])
    async with serve_router(router) as server, connect(server.address) as client, asyncio.TaskGroup() as tasks:
        calling = tasks.create_task(_outcome(client.generate("hi")))
        await wait_for(router.arrived)
        await client.close()
        assert isinstance(await calling, Cancelled)
        with pytest.raises(Cancelled):
            await client.models()


async def test_a_pause_between_attempts_ends_when_the_client_is_closed(connect):
    router = ScriptedRouter([Saturated("full", retry_after_s=60)])
    async with serve_router(router) as server, connect(server.address) as client, asyncio.TaskGroup() as tasks:
        calling = tasks.create_task(_outcome(client.generate("hi")))
        await wait_for(router.arrived)
        for _ in range(3):
            await client.models()  # behind the failure on the same connection: the pause has begun
        await client.close()
        async with asyncio.timeout(10):
            assert isinstance(await calling, Cancelled)


async def test_tokens_go_in_and_out(connect):
    async with serve_router(ScriptedRouter([])) as server, connect(server.address) as client:
        assert await client.tokenize("ab") == (97, 98)
        assert await client.tokenize([{"role": "user", "content": "c"}]) == (99,)
        assert await client.detokenize([97, 98]) == "ab"


async def test_models_and_processes_are_listed(connect):
    async with serve_router(ScriptedRouter([])) as server, connect(server.address) as client:
        assert await client.models() == (ModelInfo(name="scripted", max_context_tokens=99, fingerprint="f00d"),)
        [member] = await client.cluster()
    assert isinstance(member, MemberInfo)
    assert (member.name, member.role, member.num_running, member.is_ready) == ("decode-0", "decode", 2, True)


async def test_many_calls_share_a_client(connect):
    async with serve_router(ScriptedRouter(answer("hello"))) as server, connect(server.address) as client:
        got = await asyncio.gather(*(client.generate("hi") for _ in range(20)))
    assert {one.text for one in got} == {"hello"}


async def test_a_piece_without_tokens_does_not_count_as_the_first_token(connect):
    router = ScriptedRouter([Piece(choice=0, text=""), *answer("a")])
    async with serve_router(router) as server, connect(server.address) as client:
        assert (await client.generate("hi")).ttft_s > 0


async def _outcome(awaitable):
    try:
        return await awaitable
    except Cancelled as error:
        return error
