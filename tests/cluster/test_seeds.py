"""One seed, one answer over real processes: alone, in company, preempted, prefilled elsewhere (fp32)."""

import asyncio
import random

import pytest

from headrace import AsyncClient
from headrace.testing.cluster import LocalCluster
from headrace.testing.prompts import PROMPTS

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

MAX_TOKENS = 24
BLOCK_BYTES = 30 * 2 * 16 * 3 * 64 * 4


def random_options(rng: random.Random) -> dict:
    return {
        "temperature": rng.choice([0.5, 1.0, 1.4]),
        "top_k": rng.choice([None, 5, 60, 3000]),
        "top_p": rng.choice([1.0, 0.95, 0.7]),
        "min_p": rng.choice([0.0, 0.03]),
        "repetition_penalty": rng.choice([1.0, 1.2]),
        "presence_penalty": rng.choice([0.0, 0.4]),
        "frequency_penalty": rng.choice([0.0, 0.3]),
        "logit_bias": rng.choice([None, {rng.randrange(49152): 4.0, rng.randrange(49152): -3.0}]),
        "min_tokens": rng.choice([None, MAX_TOKENS // 2]),
        "stop_token_ids": rng.choice([None, [28, 30]]),
        "ignore_eos": rng.choice([True, False]),
        "seed": rng.getrandbits(63),
        "n": rng.choice([1, 2]),
    }


RNG = random.Random(3)
ASKED = [(text, random_options(RNG)) for text in PROMPTS[::2]]


async def ask_all(cluster: LocalCluster, concurrency: int) -> list[list[tuple[int, ...]]]:
    gate = asyncio.Semaphore(concurrency)
    async with AsyncClient(cluster.grpc) as client:

        async def ask(text: str, options: dict) -> list[tuple[int, ...]]:
            async with gate:
                answer = await client.generate(text, max_tokens=MAX_TOKENS, **options)
                return [choice.token_ids for choice in answer.choices]

        return list(await asyncio.gather(*(ask(text, options) for text, options in ASKED)))


@pytest.fixture(scope="module")
def alone(start_cluster) -> list[list[tuple[int, ...]]]:
    """What one worker answers to one request at a time."""
    return asyncio.run(ask_all(start_cluster("hybrid=1"), concurrency=1))


def test_the_options_make_a_difference(alone):
    answers = [answer for choices in alone for answer in choices]
    assert len(set(answers)) == len(answers) > len(ASKED)
    assert 0 < sum(len(answer) < MAX_TOKENS for answer in answers) < len(answers)


def test_eight_at_once_answer_as_one_at_a_time(start_cluster, alone):
    assert asyncio.run(ask_all(start_cluster("hybrid=1"), concurrency=8)) == alone


def test_answers_prefilled_in_another_process_are_the_same(start_cluster, alone):
    cluster = start_cluster("prefill=1,decode=1")
    before = cluster.footprint()
    assert asyncio.run(ask_all(cluster, concurrency=8)) == alone
    cluster.assert_no_leaks(before)


def test_preempted_answers_are_the_same(start_cluster, alone):
    cluster = start_cluster("hybrid=1", "fp32", f"worker.kv_memory_bytes={10 * BLOCK_BYTES}")
    assert asyncio.run(ask_all(cluster, concurrency=16)) == alone
    assert sum(member.load.num_preemptions for member in cluster.members().values()) > 0
