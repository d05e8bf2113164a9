"""The shared index of a real cluster: what it knows, and that requests never wait for its Redis."""

import asyncio
import shutil
import signal
import time

import pytest
import yaml
from redis.exceptions import RedisError

from headrace import AsyncClient
from headrace.cli.index_report import describe_indexes
from headrace.clock import WallClock
from headrace.core.placement import Tier
from headrace.index.config import IndexConfig
from headrace.index.connection import RedisConfig
from headrace.index.copy import open_copy
from headrace.testing.cluster import LocalCluster, wait_until
from headrace.v1 import index_pb2

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PROMPT = list(range(2000, 2400))
AWAY_S = 6.0
LONG_AWAY_S = 600.0
PAUSE_S = 0.1
STEPS = 8


def copies(cluster: LocalCluster) -> dict[str, index_pb2.DescribeIndexResponse]:
    addresses = {each.name: each.grpc for each in cluster.state().processes if each.role in ("router", "kvstore")}
    return {report.process: report.index for report in describe_indexes(addresses)}


def num_known(cluster: LocalCluster) -> dict[str, int]:
    """Return how many blocks of workers each copy knows; the kvstore's canary comes and goes among its blocks."""
    return {
        name: sum(location.num_device_blocks for location in index.locations) for name, index in copies(cluster).items()
    }


def are_current(cluster: LocalCluster) -> bool:
    return all(index.is_connected and index.is_synced and index.locations for index in copies(cluster).values())


def wait_current(cluster: LocalCluster) -> None:
    wait_until(lambda: are_current(cluster), 30.0, lambda: f"not current: {copies(cluster)}")


def ask(cluster: LocalCluster, prompt: list[int]) -> int:
    """Answer one request; return how many of its prompt tokens were reused."""

    async def run() -> int:
        async with AsyncClient(cluster.grpc) as client:
            answer = await client.generate(prompt, max_tokens=2, temperature=0.0, ignore_eos=True)
            return answer.usage.cached_tokens

    return asyncio.run(run())


async def ask_until(cluster: LocalCluster, end_s: float, pause_s: float) -> list[int]:
    """Send requests one after the other until a time; each must be answered in full."""
    answered: list[int] = []
    async with AsyncClient(cluster.grpc) as client:
        while time.monotonic() < end_s:
            prompt = [3000 + len(answered) % 1000, *PROMPT[1:64]]
            answer = await client.generate(prompt, max_tokens=4, temperature=0.0, ignore_eos=True)
            answered.append(len(answer.choices[0].token_ids))
            await asyncio.sleep(pause_s)
    return answered


def test_every_copy_of_the_index_learns_who_holds_a_prompt(cluster):
    wait_current(cluster)
    before = cluster.footprint()
    ask(cluster, PROMPT)
    num_blocks = len(PROMPT) // 16

    def holders() -> list[dict[str, int]]:
        return [
            {each.name: each.num_device_blocks + each.num_dram_blocks for each in index.locations}
            for index in copies(cluster).values()
        ]

    def all_know() -> bool:
        return all(
            known.get("kvstore", 0) >= num_blocks and known.get("prefill-0", 0) >= num_blocks for known in holders()
        )

    wait_until(all_know, 10.0, lambda: f"not all know: {holders()}")
    assert ask(cluster, PROMPT) == (len(PROMPT) - 1) // 16 * 16
    router = copies(cluster)["router"]
    assert router.actual_tokens >= 384
    assert router.predicted_tokens >= 384
    cluster.assert_no_leaks(before)


def num_of_prefill(cluster: LocalCluster) -> dict[str, int]:
    """Return how many blocks of the prefill worker each copy knows."""
    return {
        name: sum(each.num_device_blocks for each in index.locations if each.name == "prefill-0")
        for name, index in copies(cluster).items()
    }


def test_what_may_still_change_is_in_no_copy_of_the_index(cluster):
    """Blocks of a context that is only added to are there at once; those of one that may change at its close."""
    wait_current(cluster)
    before, known = cluster.footprint(), num_of_prefill(cluster)
    words = {mode: " ".join(f"{mode} {number}" for number in range(200)) for mode in ("update", "append")}

    def wait_for(num_blocks: int, when: str) -> None:
        wait_until(
            lambda: all(count >= known[name] + num_blocks for name, count in num_of_prefill(cluster).items()),
            10.0,
            lambda: f"{when}: {num_blocks} more than {known} are expected, there are {num_of_prefill(cluster)}",
        )

    async def run() -> None:
        async with AsyncClient(cluster.grpc) as client:
            num_blocks = {mode: len(await client.tokenize(text)) // 16 for mode, text in words.items()}
            async with client.context(mode="update", max_tokens=2) as changing:
                await changing.append(words["update"])
                await changing.checkpoint()
                # Computed, and told of, later than the other one: what is known then of that one would be known.
                async with client.context(max_tokens=2) as growing:
                    await growing.append(words["append"])
                    state = await growing.checkpoint()
                    least = state.num_computed // 16
                    assert least >= num_blocks["append"] - 2 > 10
                    await asyncio.to_thread(wait_for, least, "open")
                    most = max(count - known[name] for name, count in num_of_prefill(cluster).items())
                    assert most <= num_blocks["append"]
                await changing.close("?").answer()
            await asyncio.to_thread(wait_for, least + num_blocks["update"] - 1, "closed")

    asyncio.run(run())
    cluster.assert_no_leaks(before)


def hold_redis_back(cluster: LocalCluster, away_s: float, pause_s: float) -> None:
    """Stop Redis for a while under load: no request fails, and the copies follow again afterwards."""
    wait_current(cluster)
    before = cluster.footprint()
    known = num_known(cluster)
    cluster.kill("redis", signal.SIGSTOP)
    try:
        answered = asyncio.run(ask_until(cluster, time.monotonic() + away_s, pause_s))
        assert set(answered) == {4}
        assert not copies(cluster)["router"].is_connected
        assert num_known(cluster)["router"] >= min(known.values())
    finally:
        cluster.kill("redis", signal.SIGCONT)
    wait_current(cluster)
    wait_until(
        lambda: min(num_known(cluster).values()) > max(known.values()),
        15.0,
        lambda: f"what was computed meanwhile is not known: {known} {num_known(cluster)}",
    )
    cluster.assert_no_leaks(before)


def test_no_request_fails_while_redis_is_away(cluster):
    hold_redis_back(cluster, AWAY_S, PAUSE_S)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_request_fails_while_redis_is_away_for_ten_minutes(cluster):
    hold_redis_back(cluster, LONG_AWAY_S, 0.5)


def test_a_redis_that_comes_back_empty_is_told_everything_again(cluster):
    wait_current(cluster)
    ask(cluster, PROMPT)
    wait_until(lambda: min(num_known(cluster).values()) >= len(PROMPT) // 16, 10.0, lambda: f"{num_known(cluster)}")
    before, known = cluster.footprint(), num_known(cluster)
    # Stopped first: nobody writes between the loss of the files and the end.
    old = cluster.kill("redis", signal.SIGSTOP)
    shutil.rmtree(cluster.run_dir / "redis" / "appendonlydir")
    cluster.kill("redis")
    cluster.wait_restarted("redis", old)
    wait_until(
        lambda: asyncio.run(num_in_log(cluster)) >= max(known.values()),
        45.0,
        lambda: f"not told again: {known} {asyncio.run(num_in_log(cluster))}",
    )
    wait_current(cluster)
    assert min(num_known(cluster).values()) >= max(known.values())
    assert ask(cluster, PROMPT) == (len(PROMPT) - 1) // 16 * 16
    cluster.assert_no_leaks(before)


async def num_in_log(cluster: LocalCluster) -> int:
    """Return how many blocks somebody learns who knows nothing but what is in Redis now."""
    written = yaml.safe_load((cluster.run_dir / "router.yaml").read_text())["router"]
    copy = open_copy(RedisConfig(**written["redis"]), IndexConfig(**written["index"]), WallClock())
    assert copy is not None
    try:
        for _ in range(STEPS):
            await copy.replica.step(0.0)
    except (RedisError, OSError):
        return 0
    finally:
        await copy.close()
    return sum(state.num_blocks.get(Tier.DEVICE, 0) for state in copy.index.locations())
