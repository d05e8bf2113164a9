"""Clients that leave, deadlines that pass, processes that die: typed ends, and nothing left behind."""

import asyncio
import time

import pytest

from headrace import AsyncClient
from headrace.errors import DeadlineExceeded, HeadraceError
from headrace.testing.cluster import LocalCluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

LONG_PROMPT = list(range(1000, 3000))
"""Two thousand tokens: about two seconds of prefill in fp32 on two cores."""
CHUNK_S = 3.0
"""Longest time that one chunk of 512 tokens may take on a busy machine."""


def computed_tokens(cluster: LocalCluster) -> int:
    return sum(member.load.computed_tokens for member in cluster.members().values())


def is_working(cluster: LocalCluster) -> bool:
    return any(member.load.num_running + member.load.num_waiting for member in cluster.members().values())


async def leave_after_first_step(cluster: LocalCluster, prompt: list[int]) -> None:
    """Start a request and drop it as soon as a worker is at it."""
    async with AsyncClient(cluster.grpc) as client:
        asking = asyncio.ensure_future(client.generate(prompt, max_tokens=200, temperature=0.0, ignore_eos=True))
        await asyncio.to_thread(wait_until, lambda: is_working(cluster), 30.0, lambda: "nobody works on it")
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking


def test_a_client_that_leaves_stops_prefill_within_a_chunk(cluster):
    before = cluster.footprint()
    computed = computed_tokens(cluster)
    asyncio.run(leave_after_first_step(cluster, LONG_PROMPT))
    cluster.wait_quiet(timeout_s=CHUNK_S)
    assert computed_tokens(cluster) - computed < len(LONG_PROMPT)
    cluster.assert_no_leaks(before)


def test_a_client_that_leaves_while_tokens_stream_frees_both_sides(cluster):
    before = cluster.footprint()

    async def read_three() -> None:
        async with AsyncClient(cluster.grpc) as client:
            stream = client.stream("Once upon a time", max_tokens=400, temperature=0.0, ignore_eos=True)
            async with stream:
                num_read = 0
                async for _ in stream:
                    num_read += 1
                    if num_read == 3:
                        break

    asyncio.run(read_three())
    cluster.assert_no_leaks(before)


def test_a_deadline_ends_the_request_with_its_own_error(cluster):
    before = cluster.footprint()

    async def ask() -> None:
        async with AsyncClient(cluster.grpc) as client:
            await client.generate(LONG_PROMPT[1:], max_tokens=400, ignore_eos=True, timeout_s=1.0)

    begun_s = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        asyncio.run(ask())
    assert time.monotonic() - begun_s < 2.0
    cluster.assert_no_leaks(before)


async def stream_eight_and_kill(cluster: LocalCluster, victim: str) -> list[object]:
    """Stream eight answers, kill a process after the first tokens, and return how each ended."""
    first_tokens = asyncio.Event()

    async def ask(client: AsyncClient, index: int) -> object:
        prompt = f"Tell me the story number {index} of the river and the mill."
        num_tokens = 0
        try:
            async with client.stream(prompt, max_tokens=64, temperature=0.0, ignore_eos=True) as stream:
                async for piece in stream:
                    first_tokens.set()
                    num_tokens += len(piece.tokens)
        except HeadraceError as error:
            return error
        return num_tokens

    async with AsyncClient(cluster.grpc) as client:
        asking = [asyncio.ensure_future(ask(client, index)) for index in range(8)]
        await first_tokens.wait()
        await asyncio.to_thread(cluster.kill, victim)
        killed_s = time.monotonic()
        ends = await asyncio.wait_for(asyncio.gather(*asking), 60.0)
        assert all(isinstance(end, HeadraceError) or end == 64 for end in ends)
        return [*ends, time.monotonic() - killed_s]


@pytest.mark.parametrize("role", ["prefill", "decode", "kvstore"])
def test_killing_a_process_ends_every_stream_and_the_reborn_one_serves(cluster, role):
    cluster.wait_connected()
    cluster.footprint()
    victim = next(name for name in cluster.members() if name.startswith(role))
    old_pid = cluster.pid(victim)
    *ends, took_s = asyncio.run(stream_eight_and_kill(cluster, victim))
    num_finished = sum(end == 64 for end in ends)
    assert took_s < 5.0 or num_finished == 8, (ends, took_s)
    cluster.wait_restarted(victim, old_pid)
    cluster.wait_connected(60.0)
    assert cluster.pid(victim) != old_pid

    async def ask() -> int:
        async with AsyncClient(cluster.grpc) as client:
            answer = await client.generate("The capital of France is", max_tokens=4, temperature=0.0, ignore_eos=True)
            return len(answer.choices[0].token_ids)

    assert asyncio.run(ask()) == 4
    cluster.wait_quiet()
