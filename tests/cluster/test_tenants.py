"""A tenant neither reads nor times what another one has cached."""

import asyncio
import statistics
import time

import pytest

from headrace import AsyncClient
from headrace.testing.cluster import LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

NUM_TOKENS = 400
NUM_SAMPLES = 5


def prompt_of(number: int) -> list[int]:
    return [10_000 + number, *range(1000, 1000 + NUM_TOKENS - 1)]


async def first_token(cluster: LocalCluster, tenant: str, prompt: list[int], **options: str) -> tuple[float, int]:
    """Return the seconds to the first token and the tokens that were reused."""
    async with AsyncClient(cluster.grpc, tenant=tenant) as client:
        await client.models()
        begun_s = time.perf_counter()
        answer = await client.generate(prompt, max_tokens=1, temperature=0.0, ignore_eos=True, **options)
        return time.perf_counter() - begun_s, answer.usage.cached_tokens


def test_a_guessed_prompt_of_another_tenant_takes_as_long_as_one_that_nobody_sent(cluster):
    before = cluster.footprint()
    guessed, fresh, own = [], [], []

    async def measure() -> None:
        await first_token(cluster, "a", prompt_of(0))
        for number in range(NUM_SAMPLES):
            secret, unknown = prompt_of(1 + number), prompt_of(100 + number)
            await first_token(cluster, "a", secret)
            guessed.append(await first_token(cluster, "b", secret))
            fresh.append(await first_token(cluster, "b", unknown))
            own.append(await first_token(cluster, "a", secret))

    asyncio.run(measure())
    assert {cached for _, cached in guessed + fresh} == {0}
    assert {cached for _, cached in own} == {(NUM_TOKENS - 1) // 16 * 16}
    guessed_s, fresh_s, own_s = (statistics.median(took_s for took_s, _ in each) for each in (guessed, fresh, own))
    # The control: on this machine a hit shows, so a hit of the guess would show too.
    assert own_s < 0.5 * fresh_s
    assert 0.75 < guessed_s / fresh_s < 1.33
    cluster.assert_no_leaks(before)


def test_tenants_share_what_both_say_is_public(cluster):
    prompt = prompt_of(200)
    asyncio.run(first_token(cluster, "a", prompt, cache_scope="public"))
    _, cached = asyncio.run(first_token(cluster, "b", prompt, cache_scope="public"))
    assert cached == (NUM_TOKENS - 1) // 16 * 16
    _, cached = asyncio.run(first_token(cluster, "b", prompt))
    assert cached == 0
