"""Contexts that still arrive, on the real model and transport."""

import asyncio
import signal

import grpc.aio
import pytest

from headrace import AsyncClient
from headrace.testing.cluster import LocalCluster
from headrace.testing.token_context import TokenContext

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PROMPT = [1000 + 37 * number % 30_000 for number in range(1200)]
OTHER = [2000 + 41 * number % 30_000 for number in range(400)]


def computed(cluster: LocalCluster) -> int:
    return sum(member.load.computed_tokens for member in cluster.members().values())


async def one_shot(cluster: LocalCluster, prompt: tuple[int, ...] | list[int], num_tokens: int = 8) -> list[int]:
    async with AsyncClient(cluster.grpc) as client:
        answer = await client.generate(list(prompt), max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return [token.token_id for token in answer.choices[0].tokens]


@pytest.mark.parametrize("workers", ["prefill=1,decode=1", "hybrid=1"])
def test_a_context_in_pieces_has_the_answer_of_the_whole_and_leaves_nothing(start_cluster, workers):
    cluster = start_cluster(workers)
    cluster.wait_connected()
    before, num_before = cluster.footprint(), computed(cluster)

    async def stream() -> TokenContext:
        async with grpc.aio.insecure_channel(cluster.grpc) as channel:
            context = TokenContext(channel)
            for start in range(0, 1100, 100):
                context.revise(PROMPT[start : start + 100])
                if start == 500:
                    await context.until_computed()
                    context.revise(OTHER, keep=410)
                    await context.until_computed()
                    context.revise(PROMPT[410:600], keep=410)
            await context.until_computed()
            context.revise(PROMPT[1100:], is_closed=True)
            await context.until_answered()
            return context

    context = asyncio.run(stream())
    assert list(context.tokens) == PROMPT
    cluster.wait_quiet()
    # The prompt, the update that was taken back, the first piece behind what was kept, and the answer.
    assert computed(cluster) - num_before <= len(PROMPT) + len(OTHER) + (600 - 410) + 8
    assert context.answer == asyncio.run(one_shot(cluster, PROMPT))
    cluster.wait_quiet()
    cluster.assert_no_leaks(before)


def test_an_updated_context_has_the_answer_of_what_it_became(start_cluster):
    cluster = start_cluster("prefill=1,decode=1")

    async def stream() -> TokenContext:
        async with grpc.aio.insecure_channel(cluster.grpc) as channel:
            context = TokenContext(channel)
            context.revise(PROMPT[:900])
            await context.until_computed()
            context.revise(OTHER, keep=623)
            context.revise(is_closed=True)
            await context.until_answered()
            return context

    context = asyncio.run(stream())
    assert context.answer == asyncio.run(one_shot(cluster, context.tokens))


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_worker_that_dies_under_an_open_context_costs_no_token(start_cluster, victim):
    cluster = start_cluster("prefill=1,decode=1")
    cluster.wait_connected()

    async def stream() -> TokenContext:
        async with grpc.aio.insecure_channel(cluster.grpc) as channel:
            context = TokenContext(channel)
            context.revise(PROMPT[:700])
            await context.until_computed()
            cluster.kill(victim, signal.SIGKILL)
            context.revise(PROMPT[700:900])
            await asyncio.sleep(0.3)
            context.revise(PROMPT[900:], is_closed=True)
            await context.until_answered()
            return context

    context = asyncio.run(stream())
    cluster.wait_connected()
    assert context.answer == asyncio.run(one_shot(cluster, PROMPT))
    cluster.wait_quiet()


def test_a_client_that_leaves_an_open_context_frees_both_sides(start_cluster):
    cluster = start_cluster("prefill=1,decode=1")
    cluster.wait_connected()
    before = cluster.footprint()

    async def stream() -> None:
        async with grpc.aio.insecure_channel(cluster.grpc) as channel:
            context = TokenContext(channel)
            context.revise(PROMPT)
            await asyncio.sleep(0.2)
            await context.leave()

    asyncio.run(stream())
    cluster.wait_quiet()
    cluster.assert_no_leaks(before)
