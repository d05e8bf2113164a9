"""Half an hour of mixed load: nothing is lost, nothing is stuck, nothing grows.

HEADRACE_SOAK_S sets the seconds, for a try: HEADRACE_SOAK_S=90 make test-slow TESTS=tests/cluster/test_soak.py
"""

import asyncio
import itertools
import json
import os
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from headrace import AsyncClient
from headrace.errors import DeadlineExceeded, InvalidRequest
from headrace.testing.cluster import LocalCluster

SOAK_S = float(os.environ.get("HEADRACE_SOAK_S", "1800"))
ROUND_S = min(20.0, SOAK_S / 12)
"""Load between two samples, which are taken when nothing runs."""
WARM_UP = 0.3
"""Share of the rounds in which pools, caches and allocators may fill."""
STUCK_S = 120.0
CLIENTS = 8
SMALL_POOLS = ("worker.kv_memory_bytes=45000000", "kvstore.memory_bytes=45000000")
"""Some 120 blocks each: they are full, and all their pages touched, before the warm-up ends."""
MOST_RSS_BYTES = 6 << 20
"""Growth over the measured window, however long: malloc keeps and returns a few MiB as it likes."""
MOST_RSS_BYTES_PER_REQUEST = 1024
"""And growth with the work: a request that is kept costs more, its prompt alone has some hundred ints of 28 bytes."""
MOST_COUNT = 2.0
"""Growth of tasks and descriptors over the measured window: a report may be under way at any sample."""

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(SOAK_S * 2 + 600)]

PREFIXES = [[1000 + 7 * which + i for i in range(200)] for which in range(4)]
BAD_BODIES = [
    b"",
    b'{"prompt": ',
    b"[" * 50_000,
    b'{"prompt": "\xff\xfe"}',
    *(
        json.dumps({"prompt": "a", "max_tokens": 2} | change).encode()
        for change in (
            {"prompt": ""},
            {"prompt": [-1]},
            {"prompt": [49152]},
            {"prompt": "a " * 9000},
            {"prompt": {"a": 1}},
            {"temperature": -1},
            {"temperature": float("nan")},
            {"top_p": 0},
            {"n": 1000},
            {"max_tokens": 10**9},
            {"logit_bias": {"99999999": 1}},
            {"logprobs": 999},
            {"stop": [""]},
            {"timeout": -1},
            {"model": "other"},
        )
    ),
]


@dataclass
class Load:
    """Clients that each make one request after another until a time."""

    cluster: LocalCluster
    rng: random.Random
    done: Counter = field(default_factory=Counter)

    async def round(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        async with (
            AsyncClient(self.cluster.grpc) as self.client,
            httpx.AsyncClient(base_url=self.cluster.http, timeout=STUCK_S, trust_env=False) as self.http,
            asyncio.TaskGroup() as clients,
        ):
            for _ in range(CLIENTS):
                clients.create_task(self._keep_asking(end_s))

    async def _keep_asking(self, end_s: float) -> None:
        kinds = [self.answer, self.answer, self.shared, self.choices, self.leave_early, self.leave_late, self.late]
        kinds += [self.bad, self.bad_typed, self.hang_up]
        while time.monotonic() < end_s:
            kind = self.rng.choice(kinds)
            async with asyncio.timeout(STUCK_S):
                await kind()
            self.done[kind.__name__] += 1

    def prompt(self, most: int) -> list[int]:
        return [self.rng.randrange(100, 40_000) for _ in range(self.rng.randint(1, most))]

    def sampling(self) -> dict:
        return self.rng.choice(
            [
                {"temperature": 0.0},
                {"temperature": 1.0, "seed": self.rng.getrandbits(63)},
                {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 3},
                {"temperature": 1.3, "min_p": 0.05, "frequency_penalty": 0.5, "logit_bias": {11: 2.0}},
            ]
        )

    async def _all_of(self, prompt: list[int], n: int = 1) -> None:
        """Read an answer to its end: as many tokens as were asked for."""
        most = self.rng.randint(1, 40)
        answer = await self.client.generate(prompt, max_tokens=most, ignore_eos=True, n=n, **self.sampling())
        assert [len(choice.token_ids) for choice in answer.choices] == [most] * n

    async def answer(self) -> None:
        await self._all_of(self.prompt(400))

    async def shared(self) -> None:
        await self._all_of(self.rng.choice(PREFIXES) + self.prompt(40))

    async def choices(self) -> None:
        await self._all_of(self.prompt(100), n=2)

    async def leave_early(self) -> None:
        """Go while the prompt is computed, mostly."""
        try:
            async with asyncio.timeout(self.rng.random() * 0.3):
                await self.client.generate(self.prompt(1500), max_tokens=60, ignore_eos=True)
        except TimeoutError:
            self.done["left early"] += 1

    async def leave_late(self) -> None:
        """Go while tokens come."""
        async with self.client.stream(self.prompt(60), max_tokens=100, ignore_eos=True, **self.sampling()) as stream:
            pieces = self.rng.randint(1, 20)
            async for _ in stream:
                pieces -= 1
                if not pieces:
                    break

    async def late(self) -> None:
        timeout_s = self.rng.uniform(0.02, 0.6)
        try:
            await self.client.generate(self.prompt(1500), max_tokens=200, ignore_eos=True, timeout_s=timeout_s)
        except DeadlineExceeded:
            self.done["exceeded"] += 1

    async def bad(self) -> None:
        body = self.rng.choice(BAD_BODIES)
        answer = await self.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, (body[:80], answer.status_code)
        assert answer.json()["error"]["message"]

    async def bad_typed(self) -> None:
        change = self.rng.choice(
            [{"temperature": -1.0}, {"top_p": 2.0}, {"max_tokens": 10**6}, {"n": 99}, {"seed": 2**64}]
        )
        with pytest.raises(InvalidRequest):
            await self.client.generate([5, 6], **{"max_tokens": 2} | change)

    async def hang_up(self) -> None:
        """Send a part of a request, or read a part of a streamed answer, and close the connection."""
        host, port = self.cluster.http.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({"prompt": self.prompt(100), "max_tokens": 60, "ignore_eos": True, "stream": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        sent = f"{head}\r\n\r\n".encode() + body
        is_whole = self.rng.random() < 0.5
        writer.write(sent if is_whole else sent[: self.rng.randrange(1, len(sent))])
        await writer.drain()
        if is_whole:
            assert await reader.read(self.rng.randint(1, 2000))
        writer.close()
        await writer.wait_closed()


@dataclass(frozen=True)
class Sample:
    """What every process holds while nothing runs, by the name of the measure and of the process."""

    time_s: float
    num_requests: int
    held: dict[tuple[str, str], float]


def sample_of(cluster: LocalCluster, num_requests: int) -> Sample:
    footprint = cluster.footprint()
    held = {("tasks", name): count for name, count in footprint.tasks.items()}
    held |= {("descriptors", name): count for name, count in footprint.fds.items()}
    held |= {("shared memory", "all"): len(footprint.shared_memory)}
    for process in cluster.state().processes:
        held["rss", process.name] = psutil.Process(process.pid).memory_info().rss
        held["threads", process.name] = psutil.Process(process.pid).num_threads()
    for name, member in cluster.members().items():
        held["blocks", name] = member.load.ledger.total
    return Sample(time_s=time.monotonic(), num_requests=num_requests, held=held)


def growth(samples: list[Sample], key: tuple[str, str]) -> float:
    """Slope of a measure times the time it was measured for.

    The slope is the median over all pairs (Theil and Sen): a third of the samples may be outliers, as after a burst.
    """
    slopes = [
        (late.held[key] - early.held[key]) / (late.time_s - early.time_s)
        for early, late in itertools.combinations(samples, 2)
    ]
    return statistics.median(slopes) * (samples[-1].time_s - samples[0].time_s)


def grown(samples: list[Sample]) -> list[str]:
    num_requests = samples[-1].num_requests - samples[0].num_requests
    found = []
    for measure, name in samples[0].held:
        most = MOST_RSS_BYTES + MOST_RSS_BYTES_PER_REQUEST * num_requests if measure == "rss" else MOST_COUNT
        more = growth(samples, (measure, name))
        values = [sample.held[measure, name] for sample in samples]
        if more > most:
            found.append(f"{measure} of {name} grew by {more:.0f}, more than {most:.0f}: {values}")
    return found


def test_a_measure_that_grows_is_named_and_one_that_swings_is_not():
    def at(index: int) -> Sample:
        held = {("tasks", "a"): 10 + index % 2, ("tasks", "b"): 10 + index / 5, ("rss", "c"): index * 1e6}
        return Sample(time_s=20.0 * index, num_requests=50 * index, held=held)

    names = [text.split(" grew")[0] for text in grown([at(index) for index in range(20)])]
    assert names == ["tasks of b", "rss of c"]


def test_half_an_hour_of_mixed_load_leaves_nothing_behind(start_cluster):
    cluster = start_cluster("prefill=1,decode=1", "auto", *SMALL_POOLS)
    load = Load(cluster, random.Random(20))
    pids = {process.name: process.pid for process in cluster.state().processes}
    first, samples, end_s = cluster.footprint(), [], time.monotonic() + SOAK_S
    while time.monotonic() < end_s:
        asyncio.run(load.round(ROUND_S))
        samples.append(sample_of(cluster, load.done.total()))
    measured = samples[int(len(samples) * WARM_UP) :]
    report = {"requests": dict(load.done), "growth": {key: growth(measured, key) for key in measured[0].held}}
    assert not grown(measured), report
    cluster.assert_no_leaks(first)
    assert {process.name: process.pid for process in cluster.state().processes} == pids
    assert all(load.done[what] for what in ("left early", "exceeded", "leave_late", "choices", "bad", "hang_up"))
