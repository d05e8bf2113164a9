"""Ten minutes of two hundred contexts that stall as they like: nothing is lost, nothing is stuck, nothing grows.

HEADRACE_SOAK_S sets the seconds, for a try: HEADRACE_SOAK_S=60 make test-slow TESTS=tests/cluster/test_stream_soak.py
"""

import asyncio
import os
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pytest

from headrace import AsyncClient
from headrace.testing.cluster import LocalCluster

SOAK_S = float(os.environ.get("HEADRACE_SOAK_S", "600"))
NUM_STREAMS = 200
WARM_UP = 0.4
"""Share of the time in which pools, caches and allocators may fill."""
STUCK_S = 240.0
MOST_CHARS = 1200
MOST_STALL_S = 20.0
ASKED_AGAIN = 0.15
"""Share of the answers that are compared with those to the whole prompts, which takes some 0.4 s each."""
NUM_ASKERS = 8
MOST_HELD_BYTES = 6 << 20
"""Growth over the measured time of what a process holds: resident memory without what its heap has free."""
MOST_RSS_BYTES = 12 << 20
"""Growth of what is resident, by its line and by its peak: a heap has more or fewer holes at any time."""
HEAP_LOG = Path(__file__).parent / "heap_log"
SETTINGS = (
    "worker.kv_memory_bytes=90000000",
    "worker.swap_memory_bytes=30000000",
    "kvstore.memory_bytes=15000000",
    "ingestor.max_tenant_streams=256",
    "ingestor.grace_s=2.0",
    "router.max_contexts=300",
)
"""Blocks for some twelve contexts of two hundred, copies of four, and a store of eleven blocks, as dropped contexts
store none. All are full, and all their pages touched, in the warm-up."""

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(SOAK_S * 2 + 600)]

TEXT = "\n".join(topics.values())
TENANTS = ("a", "b", "c", "d")
GREEDY = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}


@dataclass
class Load:
    """Contexts, one after the other on each of many streams, until a time."""

    cluster: LocalCluster
    rng: random.Random
    end_s: float
    done: Counter = field(default_factory=Counter)
    answers: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    """Tenant, prompt and answer of some of them, to be asked again at the end."""

    async def run(self) -> None:
        async with asyncio.TaskGroup() as streams:
            for number in range(NUM_STREAMS):
                streams.create_task(self._keep_streaming(TENANTS[number % len(TENANTS)]))

    async def _keep_streaming(self, tenant: str) -> None:
        kinds = [self.append, self.append, self.update, self.reconnect, self.abandon, self.vanish]
        await asyncio.sleep(self.rng.uniform(0.0, MOST_STALL_S))
        while time.monotonic() < self.end_s:
            kind = self.rng.choice(kinds)
            async with AsyncClient(self.cluster.grpc, tenant=tenant, retries=20) as client:
                async with asyncio.timeout(STUCK_S):
                    await kind(client, tenant)
            self.done[kind.__name__] += 1

    async def stall(self) -> None:
        await asyncio.sleep(self.rng.choice((0.0, 0.0, 0.2, 1.0, self.rng.uniform(0.0, MOST_STALL_S))))

    def text(self) -> str:
        start = self.rng.randrange(len(TEXT) - MOST_CHARS)
        return TEXT[start : start + self.rng.randint(1, MOST_CHARS // 4)]

    async def append(self, client: AsyncClient, tenant: str) -> None:
        """Add pieces, some cut inside a character."""
        pieces = [self.text() for _ in range(self.rng.randint(1, 4))]
        raw = "é".join(pieces).encode()
        async with client.context(**GREEDY) as context:
            while raw:
                size = self.rng.randint(1, len(raw))
                await context.append(raw[:size])
                raw = raw[size:]
                await self.stall()
            await self._close(context, tenant, "é".join(pieces))

    async def update(self, client: AsyncClient, tenant: str) -> None:
        """Replace segments."""
        async with client.context(mode="update", **GREEDY) as context:
            segments: list[tuple[str, str]] = []
            for number in range(self.rng.randint(1, 4)):
                kept = segments[: self.rng.randint(0, len(segments))]
                segments = [*kept, (f"s{number}", self.text())]
                await context.update(segments)
                await self.stall()
            await self._close(context, tenant, "".join(text for _, text in segments))

    async def reconnect(self, client: AsyncClient, tenant: str) -> None:
        """Lose the connection in the midst."""
        pieces = [self.text() for _ in range(3)]
        async with client.context(**GREEDY) as context:
            for piece in pieces:
                await context.append(piece)
                await context._link.close()  # noqa: SLF001 what a broken connection does
                await self.stall_briefly()
            await self._close(context, tenant, "".join(pieces))

    async def stall_briefly(self) -> None:
        await asyncio.sleep(self.rng.uniform(0.0, 0.5))

    async def abandon(self, client: AsyncClient, tenant: str) -> None:
        """Lose interest, also in the midst of an answer."""
        async with client.context(max_tokens=200, ignore_eos=True) as context:
            await context.append(self.text())
            await self.stall()
            if self.rng.random() < 0.5:
                async for _ in context.close():
                    break

    async def vanish(self, client: AsyncClient, tenant: str) -> None:
        """Leave without a word."""
        context = await client.context(**GREEDY).__aenter__()
        await context.append(self.text())
        await self.stall_briefly()
        await client.close()
        await context._link.close()  # noqa: SLF001

    async def _close(self, context, tenant: str, text: str) -> None:
        answer = await context.close("?").answer()
        assert len(answer.token_ids) == GREEDY["max_tokens"]
        if self.rng.random() < ASKED_AGAIN:
            self.answers.append((tenant, text + "?", answer.token_ids))


@dataclass(frozen=True)
class Memory:
    """What a process held at some times, by its own account.

    Attributes:
        times_s: When.
        resident: Bytes.
        held: Of them, those that its heap had not free.
    """

    times_s: list[float]
    resident: list[float]
    held: list[float]

    @classmethod
    def read(cls, path: Path, begun_s: float, end_s: float) -> "Memory":
        lines = [[float(word) for word in line.split()] for line in path.read_text().splitlines()]
        rows = [(time_s, resident, resident - free) for time_s, resident, free in lines if begun_s <= time_s <= end_s]
        return cls(*(list(column) for column in zip(*rows, strict=True)))

    @property
    def first(self) -> int:
        """Index of the first sample behind the warm-up."""
        return int(len(self.times_s) * WARM_UP)

    @property
    def growth(self) -> float:
        """Bytes by which `held` grew after the warm-up."""
        return self._line(self.held)

    @property
    def resident_growth(self) -> float:
        """Bytes by which `resident` grew after the warm-up."""
        return self._line(self.resident)

    def _line(self, values: list[float]) -> float:
        times_s = self.times_s[self.first :]
        return statistics.linear_regression(times_s, values[self.first :]).slope * (times_s[-1] - times_s[0])

    @property
    def peak_growth(self) -> float:
        """Bytes by which the most that was resident is more than in the warm-up."""
        return max(self.resident[self.first :]) - max(self.resident[: self.first])


async def ask_again(load: Load) -> list[str]:
    """Return the prompts whose answer is another one when they are asked at once."""
    wrong, waiting = [], iter(load.answers)

    async def ask() -> None:
        for tenant, prompt, answered in waiting:
            async with AsyncClient(load.cluster.grpc, tenant=tenant) as client:
                if (await client.generate(prompt, **GREEDY)).token_ids != answered:
                    wrong.append(prompt)

    async with asyncio.TaskGroup() as askers:
        for _ in range(NUM_ASKERS):
            askers.create_task(ask())
    return wrong


def test_memory_that_grows_is_seen_and_memory_that_swings_is_not(tmp_path):
    (tmp_path / "1").write_text("".join(f"{t} {1000 + t * 2} {t % 3}\n" for t in range(100)))
    (tmp_path / "2").write_text("".join(f"{t} {1000 + t % 5 + t % 3} {t % 3}\n" for t in range(100)))
    grows, swings = (Memory.read(tmp_path / name, 10.0, 89.0) for name in ("1", "2"))
    assert grows.growth == pytest.approx(2 * 47, abs=2)
    assert grows.resident_growth == pytest.approx(2 * 47)
    assert grows.peak_growth == 2 * 48
    assert swings.growth == pytest.approx(0, abs=2)
    assert swings.peak_growth == 0


def test_two_hundred_stalling_streams_lose_nothing_and_leave_nothing(tmp_path):
    folders = filter(None, (str(HEAP_LOG), os.environ.get("PYTHONPATH")))
    env = {"HEAP_LOG": str(tmp_path), "PYTHONPATH": os.pathsep.join(folders)}
    with LocalCluster(tmp_path / "run", settings=SETTINGS, env=env) as cluster:
        cluster.wait_connected()
        pids = {process.name: process.pid for process in cluster.state().processes}
        before, begun_s = cluster.footprint(), time.monotonic()
        redis = psutil.Process(pids["redis"])
        redis_bytes = redis.memory_info().rss
        load = Load(cluster, random.Random(5), begun_s + SOAK_S)
        asyncio.run(load.run())
        redis_bytes = redis.memory_info().rss - redis_bytes
        memory = {
            name: Memory.read(tmp_path / str(pid), begun_s, load.end_s) for name, pid in pids.items() if name != "redis"
        }
        cluster.wait_quiet(60.0)
        cluster.assert_no_leaks(before)
        assert {process.name: process.pid for process in cluster.state().processes} == pids
        assert all(load.done[kind] for kind in ("append", "update", "reconnect", "abandon", "vanish")), load.done
        print(f"\n{dict(load.done)}, {len(load.answers)} compared")  # noqa: T201
        for name, found in memory.items():
            grown = [size / 2**20 for size in (found.growth, found.resident_growth, found.peak_growth)]
            print("{}: {:+.1f} MiB held, {:+.1f} resident, {:+.1f} at its peak".format(name, *grown))  # noqa: T201
        assert load.answers
        assert not asyncio.run(ask_again(load))
    assert max(redis_bytes, *(found.growth for found in memory.values())) < MOST_HELD_BYTES
    assert max(found.resident_growth for found in memory.values()) < MOST_RSS_BYTES
    assert max(found.peak_growth for found in memory.values()) < MOST_RSS_BYTES
