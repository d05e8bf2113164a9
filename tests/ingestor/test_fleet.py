"""SDK, ingestor, router, workers, engines: a context has the answer of its whole text, whatever breaks on the way."""

import asyncio
import contextlib
import random
from functools import partial

import pytest

from headrace import AsyncClient
from headrace.core.cost import CostModel
from headrace.engine.scheduler import RECOMPUTE_ALWAYS, FirstComeFirstServed
from headrace.engine.sequence import Sequence
from headrace.engine.swap import HostSwap
from headrace.techniques.stream2llm.order import make_order
from headrace.techniques.stream2llm.preempt import PreemptByCost, SwapAlways
from headrace.testing.fleet import open_fleet
from headrace.testing.ingestor import open_ingestor, serve_frontend
from headrace.worker.config import WorkerRole

ROLES = {"p": WorkerRole.PREFILL, "d": WorkerRole.DECODE, "h": WorkerRole.HYBRID}
CLUSTERS = ["p0 p1 d0 d1", "h0 h1", "p0 d0"]
WORDS = "water wheel é 水車 runs. \n the mill's 12 , and (down) 🌊 stream".split(" ")
NUM_CHARS = 60
NUM_ROUNDS = 80


@pytest.fixture(autouse=True)
def _quick_fleet(monkeypatch):
    monkeypatch.setattr("headrace.router.workers.REPORT_INTERVAL_MS", 10)
    monkeypatch.setattr("headrace.router.workers.RECONNECT_S", 0.02)
    monkeypatch.setattr("headrace.router.sequence.MOVE_PAUSE_S", 0.05)
    monkeypatch.setattr("headrace.decode.reservations.EXPIRE_INTERVAL_S", 0.02)
    monkeypatch.setattr("headrace.decode.reservations.LANDING_S", 0.05)


class Cluster:
    """A fleet behind a router's port, an ingestor before it, and a client; all but the client may die and come back."""

    def __init__(self, stack, fleet):
        self.fleet, self._stack = fleet, stack
        self._router, self._port = contextlib.AsyncExitStack(), 0

    async def start(self, cuts):
        await self.start_router()
        self.ingestor = await self._stack.enter_async_context(
            open_ingestor(
                self.fleet.live.model(None).text,
                [f"127.0.0.1:{self._port}"],
                cuts=cuts,
                coalesce_s=0.002,
                reopen_s=60.0,
                # An opening whose response is lost leaves a context that nobody knows, so long.
                grace_s=3.0,
            )
        )
        self.client = await self._stack.enter_async_context(
            AsyncClient(self.ingestor.address, timeout_s=60.0, retries=50)
        )
        return self

    async def start_router(self):
        self._router = await self._stack.enter_async_context(contextlib.AsyncExitStack())
        server = await self._router.enter_async_context(serve_frontend(self.fleet.live, self._port))
        self._port = server.port

    async def restart_router(self):
        await self._router.aclose()
        await self.start_router()

    async def restart_worker(self, name):
        await self.fleet.workers[name].kill()
        await self.fleet.revive(name)

    async def restart_ingestor(self):
        await self.ingestor.start(await self.ingestor.break_off())

    async def one_shot(self, text, sampling):
        spec = self.fleet.spec(self.ingestor.parts.model.encode(text), **sampling)
        return tuple(token.token_id for token in await self.fleet.tokens(spec))


@contextlib.asynccontextmanager
async def open_cluster(folder, names, cuts, num_blocks=64, **shape):
    roles = {name: ROLES[name[0]] for name in names.split()}
    async with open_fleet(folder, roles, num_blocks=num_blocks, **shape) as fleet:
        async with contextlib.AsyncExitStack() as stack:
            yield await Cluster(stack, fleet).start(cuts)


class Script:
    """One context that grows, changes and waits in random order, once in a while for `stall_s`."""

    def __init__(self, seed, stall_s=0.0):
        self.stall_s = stall_s
        self.rng = random.Random(seed)
        self.mode = self.rng.choice(["append", "update"])
        self.prefix = self.rng.choice(["", "Before it. "])
        self.segments, self.num_segments = [], 0
        self.query = ""
        self.sampling = {"max_tokens": self.rng.choice([1, 8, 60]), "seed": seed, "ignore_eos": True}
        self.sampling["temperature"] = self.rng.choice([0.0, 1.0])

    def words(self):
        return " ".join(self.rng.choice(WORDS) for _ in range(self.rng.randint(1, 4))) + " "

    @property
    def text(self):
        return "".join(text for _, text in self.segments)

    def choose_query(self):
        """None at all, if that leaves anything to be answered."""
        if not (self.prefix or self.text) or self.rng.random() < 0.7:
            self.query = self.words()
        return self.query

    def _new(self):
        self.num_segments += 1
        return (f"s{self.num_segments}", self.words())

    async def run(self, client):
        async with client.context(self.prefix, mode=self.mode, **self.sampling) as context:
            for _ in range(self.rng.randint(2, 10)):
                await self._change(context)
                if self.rng.random() < 0.5:
                    await asyncio.sleep(self.rng.random() / 20)
                if self.rng.random() < 0.2:
                    await asyncio.sleep(self.stall_s)
            stream, tokens = context.close(self.choose_query()), []
            async for piece in stream:
                tokens += [token.token_id for token in piece.tokens]
            assert (await stream.answer()).token_ids == tuple(tokens)
            return tuple(tokens)

    async def _change(self, context):
        kind = self.rng.choice(["append", "append", "checkpoint", "update", "replace", "clear"])
        if kind == "checkpoint":
            await context.checkpoint()
        elif self.mode == "append" or not self.segments or (kind == "append" and len(self.text) < NUM_CHARS):
            if len(self.text) < NUM_CHARS:
                await self._append(context)
        elif kind == "clear":
            self.segments = []
            await context.update([])
        elif kind == "update":
            self.rng.shuffle(self.segments)
            self.segments = [*self.segments[:3], self._new()]
            await context.update(self.segments)
        else:
            first = self.rng.randrange(len(self.segments))
            start, new = self.segments[first][0], [self._new()]
            self.segments[first:] = new
            await context.replace(start, new)

    async def _append(self, context):
        segment, text = self._new()
        self.segments.append((segment, text))
        raw, cut = text.encode(), self.rng.randrange(len(text))
        await context.append(raw[:cut], segment)
        await context.append(raw[cut:], segment)


async def disturb(cluster, rng, is_over):
    """Break something every now and then."""
    while not is_over.is_set():
        await asyncio.sleep(rng.random() / 10)
        match rng.choice(["ingestor", "ingestor", "router", "worker", "nothing"]):
            case "ingestor":
                await cluster.restart_ingestor()
            case "router":
                await cluster.restart_router()
            case "worker":
                await cluster.restart_worker(rng.choice(list(cluster.fleet.workers)))


async def check(cluster, seed, num_contexts, *, is_disturbed, stall_s=0.0):
    scripts = [Script(1000 * seed + number, stall_s) for number in range(num_contexts)]
    is_over = asyncio.Event()
    async with asyncio.timeout(60.0), asyncio.TaskGroup() as tasks:
        if is_disturbed:
            tasks.create_task(disturb(cluster, random.Random(seed), is_over))
        found = await asyncio.gather(*(script.run(cluster.client) for script in scripts))
        is_over.set()
    await cluster.ingestor.at_rest()
    for script, tokens in zip(scripts, found, strict=True):
        whole = script.prefix + script.text + script.query
        assert tokens == await cluster.one_shot(whole, script.sampling), f"seed {seed}"
    await cluster.fleet.at_rest()


@pytest.mark.parametrize("names", CLUSTERS)
async def test_a_context_has_the_tokens_of_one_request(tmp_path, cuts, names):
    async with open_cluster(tmp_path, names, cuts) as cluster:
        await check(cluster, 1, 6, is_disturbed=False)


@pytest.mark.parametrize("names", CLUSTERS)
@pytest.mark.parametrize("seed", range(2))
async def test_whatever_breaks_a_context_has_the_tokens_of_one_request(tmp_path, cuts, names, seed):
    async with open_cluster(tmp_path, names, cuts) as cluster:
        await check(cluster, seed, 4, is_disturbed=True)


class Counted:
    """Counts the calls of a method of a class, on all of its objects."""

    def __init__(self, monkeypatch, owner, name):
        self.num_calls, method = 0, getattr(owner, name)

        def call(this, *args):
            self.num_calls += 1
            return method(this, *args)

        monkeypatch.setattr(owner, name, call)


COST = CostModel(step_s=1e-4, prompt_s=0.0, token_s=1e-6, pair_s=0.0, decode_s=0.0, context_s=0.0)
POLICIES = {
    "default, recompute": (FirstComeFirstServed, RECOMPUTE_ALWAYS),
    "fcfs, swap": (partial(make_order, "fcfs"), SwapAlways()),
    "lcas, auto": (partial(make_order, "lcas"), PreemptByCost(COST)),
    "mcps, swap": (partial(make_order, "mcps"), SwapAlways()),
}
PRESSED = [
    *((names, "fcfs, swap") for names in CLUSTERS),
    ("p0 p1 d0 d1", "lcas, auto"),
    ("h0 h1", "default, recompute"),
    ("p0 d0", "mcps, swap"),
]


@pytest.mark.parametrize(("names", "policies"), PRESSED)
@pytest.mark.parametrize("is_disturbed", [False, True])
async def test_contexts_that_stall_and_compete_for_blocks_have_them_too(
    tmp_path, cuts, monkeypatch, names, policies, is_disturbed
):
    """A pool for two or three of sixteen: blocks are given up, with a copy and without, and come back."""
    evictions, saves = Counted(monkeypatch, Sequence, "lose_blocks"), Counted(monkeypatch, HostSwap, "save")
    order, preempt = POLICIES[policies]
    shape = {"num_blocks": 36, "num_swap_blocks": 12, "stall_s": 0.03, "order": order, "preempt": preempt}
    async with open_cluster(tmp_path, names, cuts, **shape) as cluster:
        for seed in range(2):
            await check(cluster, 10 + seed, 16, is_disturbed=is_disturbed, stall_s=0.1)
    assert 0 < evictions.num_calls
    assert saves.num_calls < evictions.num_calls
    assert bool(saves.num_calls) == (preempt is not RECOMPUTE_ALWAYS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("names", CLUSTERS)
@pytest.mark.parametrize("is_disturbed", [False, True])
async def test_no_context_of_thousands_waits_for_ever_for_blocks(tmp_path, cuts, names, is_disturbed):
    """Whoever waits for blocks that another one keeps while it waits too does so once in hundreds of rounds."""
    shape = {"num_blocks": 36, "num_swap_blocks": 12, "stall_s": 0.03}
    async with open_cluster(tmp_path, names, cuts, **shape) as cluster:
        for seed in range(NUM_ROUNDS):
            await check(cluster, 100 + seed, 16, is_disturbed=is_disturbed, stall_s=0.05)
            for worker in cluster.fleet.workers.values():
                worker.runner.batches.clear()
