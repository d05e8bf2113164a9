"""The client commands, each as a process of its own against a scripted router."""

import asyncio
import signal
import sys
from contextlib import asynccontextmanager

from headrace.errors import Saturated
from headrace.testing.router import Act, ScriptedRouter, answer, serve_router


@asynccontextmanager
async def command(server, *arguments):
    """Run a command against the router; killed if it does not end."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    line = (sys.executable, "-m", "headrace.cli.main", *arguments, "--address", server.address)
    process = await asyncio.create_subprocess_exec(*line, **pipes)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def run(server, *arguments, stdin=""):
    async with asyncio.timeout(30), command(server, *arguments) as process:
        out, err = await process.communicate(stdin.encode())
    return process.returncode, out.decode(), err.decode()


def said(request):
    return [(message.role, message.content) for message in request.chat.messages]


async def test_chat_once_prints_the_answer_and_its_times_apart():
    router = ScriptedRouter(answer("hello"))
    async with serve_router(router) as server:
        code, out, err = await run(
            server, "chat", "--once", "hi", "--system", "be brief", "--max-tokens", "9", "--temperature", "0"
        )
    assert (code, out) == (0, "hello\n")
    assert "TTFT" in err
    assert "tokens/s" in err
    assert said(router.requests[0]) == [("system", "be brief"), ("user", "hi")]
    assert (router.requests[0].sampling.max_tokens, router.requests[0].sampling.temperature) == (9, 0)


async def test_a_chat_remembers_what_was_said():
    router = ScriptedRouter(answer("one"), answer("two"))
    async with serve_router(router) as server:
        code, out, _ = await run(server, "chat", stdin="first\n\nsecond\n")
    assert (code, out) == (0, "one\ntwo\n")
    assert said(router.requests[1]) == [("user", "first"), ("assistant", "one"), ("user", "second")]


async def test_an_error_ends_one_answer_and_not_the_chat():
    router = ScriptedRouter([Saturated("the cluster is full", retry_after_s=10_000)], answer("ok"))
    async with serve_router(router) as server:
        code, out, err = await run(server, "chat", stdin="first\nsecond\n")
    assert (code, out) == (0, "ok\n")
    assert "the cluster is full" in err
    assert said(router.requests[1]) == [("user", "second")]


async def test_ctrl_c_stops_an_answer_and_not_the_chat():
    router = ScriptedRouter([*answer("ab", is_last=False)[:1], Act.HANG], answer("ok"))
    async with asyncio.timeout(30), serve_router(router) as server, command(server, "chat") as process:
        process.stdin.write(b"first\n")
        assert await process.stdout.readexactly(1) == b"a"
        process.send_signal(signal.SIGINT)
        await router.left.wait()
        out, err = await process.communicate(b"second\n")
    assert (process.returncode, out) == (0, b"ok\n")
    assert b"stopped" in err
    assert said(router.requests[1]) == [("user", "second")]


async def test_a_failed_single_message_is_an_exit_status():
    router = ScriptedRouter([Saturated("the cluster is full", retry_after_s=10_000)])
    async with serve_router(router) as server:
        code, out, err = await run(server, "chat", "--once", "hi")
    assert (code, out, err) == (1, "", "headrace: the cluster is full\n")


async def test_complete_goes_on_from_an_argument_or_from_stdin():
    router = ScriptedRouter(answer("ok"))
    async with serve_router(router) as server:
        code, out, _ = await run(server, "complete", "from here", "--stop", "X", "--stop", "Y", "--seed", "3")
        assert (code, out) == (0, "ok\n")
        await run(server, "complete", "-", stdin="from there")
    assert [request.text for request in router.requests] == ["from here", "from there"]
    assert list(router.requests[0].stop) == ["X", "Y"]
    assert router.requests[0].sampling.seed == 3


async def test_models_shows_names_and_context():
    async with serve_router(ScriptedRouter([])) as server:
        code, out, _ = await run(server, "models")
    assert code == 0
    assert out.splitlines()[1].split() == ["scripted", "99", "f00d"]
