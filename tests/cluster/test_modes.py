"""The same request gives the same tokens however the cluster serves it (fp32; ARCHITECTURE section 11)."""

import asyncio

import pytest

from headrace import AsyncClient
from headrace.testing.cluster import LocalCluster
from headrace.testing.prompts import PROMPTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

MAX_TOKENS = 18
"""More than a block holds: every answer goes on into a block that it began itself."""
TEXTS = (*PROMPTS, "\n".join(PROMPTS))
"""The last one is some 250 tokens long: it is cut into chunks, and its blocks are shared."""
SAMPLED_TEXTS = TEXTS[-8:]
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.8, "seed": 7, "top_p": 0.95}


async def ask_all(cluster: LocalCluster, concurrency: int) -> list[list[int]]:
    """Answer every text greedily, and some sampled."""
    gate = asyncio.Semaphore(concurrency)
    async with AsyncClient(cluster.grpc) as client:

        async def ask(text: str, sampling: dict) -> list[int]:
            async with gate:
                answer = await client.generate(text, max_tokens=MAX_TOKENS, ignore_eos=True, **sampling)
                return list(answer.token_ids)

        asking = [*(ask(text, GREEDY) for text in TEXTS), *(ask(text, SAMPLED) for text in SAMPLED_TEXTS)]
        return list(await asyncio.gather(*asking))


@pytest.fixture(scope="module")
def aggregated(start_cluster) -> list[list[int]]:
    """What one hybrid worker answers: the oracle of this module."""
    cluster = start_cluster("hybrid=1")
    before = cluster.footprint()
    answers = asyncio.run(ask_all(cluster, concurrency=32))
    cluster.assert_no_leaks(before)
    return answers


def check(cluster: LocalCluster, aggregated: list[list[int]], concurrency: int) -> None:
    before = cluster.footprint()
    assert asyncio.run(ask_all(cluster, concurrency)) == aggregated
    cluster.assert_no_leaks(before)


def computed_tokens(cluster: LocalCluster) -> int:
    return sum(member.load.computed_tokens for member in cluster.members().values())


def test_every_answer_has_all_its_tokens(aggregated):
    greedy, sampled = aggregated[: len(TEXTS)], aggregated[len(TEXTS) :]
    assert all(len(answer) == MAX_TOKENS for answer in aggregated)
    assert len({tuple(answer) for answer in greedy}) > len(TEXTS) // 2
    assert sum(one != other for one, other in zip(greedy[-8:], sampled, strict=True)) > 4


def test_preempted_and_resumed_equals_aggregated(start_cluster, aggregated):
    block_bytes = 30 * 2 * 16 * 3 * 64 * 4
    cluster = start_cluster("hybrid=1", "fp32", f"worker.kv_memory_bytes={26 * block_bytes}")
    check(cluster, aggregated, concurrency=16)
    assert sum(member.load.num_preemptions for member in cluster.members().values()) > 0


def test_disaggregated_equals_aggregated(start_cluster, aggregated):
    check(start_cluster("prefill=1,decode=1"), aggregated, concurrency=16)


def test_a_prefix_from_the_kvstore_equals_aggregated(start_cluster, aggregated):
    """The prefill worker's own cache holds one prompt at most, the decode workers start anew."""
    cluster = start_cluster("prefill=1,decode=1")
    asyncio.run(ask_all(cluster, concurrency=16))
    cluster.wait_quiet()
    for name in ("prefill-0", "decode-0"):
        cluster.wait_restarted(name, cluster.kill(name))
    cluster.wait_connected()

    async def ask() -> tuple[list[int], int]:
        async with AsyncClient(cluster.grpc) as client:
            answer = await client.generate(TEXTS[-1], max_tokens=MAX_TOKENS, ignore_eos=True, **GREEDY)
            return list(answer.token_ids), answer.usage.cached_tokens

    tokens, cached_tokens = asyncio.run(ask())
    assert cached_tokens >= 128
    assert tokens == aggregated[len(TEXTS) - 1]
    cluster.wait_quiet()


@pytest.mark.parametrize("budget", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_any_chunk_size_equals_aggregated(start_cluster, aggregated, budget):
    """512, the default, is what the other tests run with; 64 lies between the two."""
    check(start_cluster("prefill=1,decode=1", "fp32", f"worker.token_budget={budget}"), aggregated, concurrency=16)


@pytest.mark.slow
def test_chunks_in_bins_equal_aggregated(start_cluster, aggregated):
    """On one axis, the default, chunks lie in all other tests."""
    check(start_cluster("prefill=1,decode=1", "fp32", "worker.pack=bins"), aggregated, concurrency=16)


def test_two_by_two_under_concurrency_equals_aggregated_cold_and_with_prefix_hits(start_cluster, aggregated):
    cluster = start_cluster("prefill=2,decode=2")
    check(cluster, aggregated, concurrency=8)
    cold = computed_tokens(cluster)
    check(cluster, aggregated, concurrency=16)
    assert computed_tokens(cluster) - cold < cold
