"""The same request gives the same tokens however the cluster serves it (fp32; ARCHITECTURE section 11)."""

import asyncio

import pytest

from headrace import AsyncClient
from headrace.testing.cluster import LocalCluster
from headrace.testing.prompts import PROMPTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

MAX_TOKENS = 32
SAMPLED = {"temperature": 0.8, "seed": 7, "top_p": 0.95}
GREEDY = {"temperature": 0.0}


async def ask_all(cluster: LocalCluster, sampling: dict, *, concurrency: int, times: int = 1) -> list[list[int]]:
    """Answer every prompt; with `times` > 1 return the last round."""
    gate = asyncio.Semaphore(concurrency)
    async with AsyncClient(cluster.grpc) as client:

        async def ask(prompt: str) -> list[int]:
            async with gate:
                answer = await client.generate(prompt, max_tokens=MAX_TOKENS, ignore_eos=True, **sampling)
                return list(answer.choices[0].token_ids)

        answers: list[list[int]] = []
        for _ in range(times):
            answers = list(await asyncio.gather(*(ask(prompt) for prompt in PROMPTS)))
        return answers


@pytest.fixture(scope="module")
def aggregated(start_cluster) -> dict[str, list[list[int]]]:
    """What one hybrid worker answers, one request at a time: the oracle of this module."""
    cluster = start_cluster("hybrid=1")
    before = cluster.footprint()
    answers = {
        "greedy": asyncio.run(ask_all(cluster, GREEDY, concurrency=1)),
        "sampled": asyncio.run(ask_all(cluster, SAMPLED, concurrency=1)),
    }
    cluster.assert_no_leaks(before)
    return answers


def check(cluster: LocalCluster, aggregated: dict, *, concurrency: int, times: int = 1) -> None:
    before = cluster.footprint()
    assert asyncio.run(ask_all(cluster, GREEDY, concurrency=concurrency, times=times)) == aggregated["greedy"]
    assert asyncio.run(ask_all(cluster, SAMPLED, concurrency=concurrency, times=times)) == aggregated["sampled"]
    cluster.assert_no_leaks(before)


def test_every_answer_has_all_its_tokens(aggregated):
    assert all(len(answer) == MAX_TOKENS for answers in aggregated.values() for answer in answers)
    assert len({tuple(answer) for answer in aggregated["greedy"]}) > len(PROMPTS) // 2
    assert aggregated["greedy"] != aggregated["sampled"]


def test_disaggregated_equals_aggregated(start_cluster, aggregated):
    check(start_cluster("prefill=1,decode=1"), aggregated, concurrency=1)


def test_two_by_two_under_concurrency_equals_aggregated(start_cluster, aggregated):
    check(start_cluster("prefill=2,decode=2"), aggregated, concurrency=8, times=2)


@pytest.mark.parametrize("budget", [16, 64, 512])
def test_any_chunk_size_equals_aggregated(start_cluster, aggregated, budget):
    check(start_cluster("prefill=1,decode=1", "fp32", f"worker.token_budget={budget}"), aggregated, concurrency=4)


def test_preempted_and_resumed_equals_aggregated(start_cluster, aggregated):
    block_bytes = 30 * 2 * 16 * 3 * 64 * 4
    cluster = start_cluster("hybrid=1", "fp32", f"worker.kv_memory_bytes={24 * block_bytes}")
    check(cluster, aggregated, concurrency=8)
    assert sum(member.load.num_preemptions for member in cluster.members().values()) > 0
