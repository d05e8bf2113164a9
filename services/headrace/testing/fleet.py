"""A whole cluster in one process: real router, servicers and engines; a fake model, a fake transport.

Only what would need a GPU, NIXL or a second process is fake; gRPC runs over loopback.
"""

import asyncio
import contextlib
import dataclasses
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from headrace.clock import Clock, WallClock
from headrace.core.cost import CostModel
from headrace.core.request import SamplingParams, SequenceId, SequenceSpec, Token
from headrace.decode.job import DecodeParts
from headrace.decode.reservations import Reservations
from headrace.decode.service import DecodeServicer
from headrace.engine.batch import Batch
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import CacheChange, EngineCommand, EngineEvent, EngineStats, Open
from headrace.engine.thread import EngineThread
from headrace.index.prefix_index import PrefixIndex
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.parts import KvStoreParts
from headrace.prefill.parts import PrefillParts
from headrace.prefill.service import PrefillServicer
from headrace.router.actor import LiveRequests
from headrace.router.config import RouterConfig
from headrace.router.context import ContextRun
from headrace.router.drift import HitDrift
from headrace.router.prefixes import Prefixes
from headrace.router.sequence import SequenceParts, SequenceRun
from headrace.router.workers import WorkerTable
from headrace.runtime.channels import Channels
from headrace.runtime.cluster import ClusterServicer
from headrace.runtime.server import GrpcServer
from headrace.runtime.telemetry import RouterMetrics
from headrace.seams.order import OrderPolicy
from headrace.seams.preempt import PreemptPolicy
from headrace.techniques.sarathi.shape import ChunkedShape
from headrace.techniques.stream2llm.order import make_order
from headrace.techniques.stream2llm.preempt import SwapAlways
from headrace.testing.connector import Fabric, FakeConnector
from headrace.testing.kvstore import fake_kvstore, serve_kvstore
from headrace.testing.lane import FaultyLane
from headrace.testing.runner import FakeRunner
from headrace.testing.text import byte_text_model
from headrace.v1 import cluster_pb2_grpc, decode_pb2_grpc, pool_pb2_grpc, prefill_pb2_grpc
from headrace.worker.announcing import Announcer
from headrace.worker.blocks import BlockExchange
from headrace.worker.config import WorkerConfig, WorkerRole
from headrace.worker.digests import BlockDigests
from headrace.worker.engine import AsyncEngine
from headrace.worker.exchange_parts import ExchangeConfig, ExchangeParts
from headrace.worker.lifetimes import Lifetimes
from headrace.worker.peers import Peers
from headrace.worker.pool_link import LinkParts, PoolCaller
from headrace.worker.pool_service import PoolServicer
from headrace.worker.process import MemberParts, WorkerMember
from headrace.worker.reads import Reads

FINGERPRINT = "fake-model"
BLOCK_TOKENS = 4
VOCAB_SIZE = 259
PATIENCE_S = 10.0
NEW_WORK = (
    "/headrace.v1.DecodeService/Decode",
    "/headrace.v1.DecodeService/DecodeContext",
    "/headrace.v1.PrefillService/Prefill",
    "/headrace.v1.PrefillService/PrefillContext",
    "/headrace.v1.PoolService/AcquireGet",
)
Tick = Callable[[str], None]


class ArenaRunner(FakeRunner):
    """A fake model whose blocks are bytes that a transport can move; it computes while its gate is open.

    Attributes:
        blocks: The pool, `[block, byte]`, uint8.
        gate: Steps wait for it.
        entered: Set when a step begins.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks, block_tokens=BLOCK_TOKENS, vocab_size=VOCAB_SIZE)
        # As large as the layout says, for that is what the kvstore makes room for.
        words = np.full((num_blocks, self.layout.block_bytes // 8), 2**64 - 1, dtype=np.uint64)
        self._tokens, self._positions = words[:, :BLOCK_TOKENS], words[:, BLOCK_TOKENS : 2 * BLOCK_TOKENS]
        self.blocks = words.view(np.uint8)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def run(self, batch: Batch) -> torch.Tensor:
        """Compute a step once the gate is open."""
        self.entered.set()
        if not self.gate.wait(PATIENCE_S):
            raise TimeoutError("the test left the gate closed")
        return super().run(batch)


class TappedPort:
    """Stands before an engine's thread and tells of every command and event."""

    def __init__(self, thread: EngineThread, name: str, tick: Tick) -> None:
        self._thread = thread
        self._name = name
        self._tick = tick

    def stats(self) -> EngineStats:
        """Return the engine's last snapshot."""
        return self._thread.stats()

    def send(self, command: EngineCommand) -> None:
        """Pass a command on."""
        self._tick(f"{self._name} {type(command).__name__}")
        if isinstance(command, Open):
            sink = command.sink

            def tapped(event: EngineEvent) -> None:
                sink(event)
                self._tick(f"{self._name} {type(event).__name__}")

            command = dataclasses.replace(command, sink=tapped)
        self._thread.send(command)


class TappedConnector(FakeConnector):
    """Tells of every write, before and after."""

    tick: Tick = staticmethod(lambda _: None)

    async def write(
        self, agent_name: str, local_ids: Sequence[int], remote_ids: Sequence[int], deadline_s: float
    ) -> None:
        """Copy own blocks into a peer's blocks."""
        self.tick("write")
        await super().write(agent_name, local_ids, remote_ids, deadline_s)
        self.tick("written")


class FleetWorker:
    """One worker behind a lane of its own.

    Attributes:
        runner: Its fake model.
        lane: Cut it and the worker looks killed.
    """

    def __init__(
        self, fleet: "Fleet", name: str, role: WorkerRole, lane: FaultyLane, fingerprint: str = FINGERPRINT
    ) -> None:
        self.name, self.role, self.lane = name, role, lane
        num_blocks = fleet.shape.num_blocks
        self.epoch = f"{name}-{fleet.next_epoch()}"
        self._fabric, clock, tasks = fleet.fabric, fleet.clock, fleet.tasks
        self._channels = Channels()
        self.runner = ArenaRunner(num_blocks)
        bounds = EngineConfig(
            num_blocks=num_blocks,
            token_budget=8,
            max_running=32,
            fingerprint=FINGERPRINT,
            num_swap_blocks=fleet.shape.num_swap_blocks,
            stall_s=fleet.shape.stall_s,
        )
        self.thread = EngineThread(
            Engine(
                self.runner,
                bounds,
                order=fleet.shape.order(),
                shape=ChunkedShape(),
                preempt=fleet.shape.preempt,
                clock=clock,
                on_cache_change=self._note_change,
            ),
            clock,
        )
        self._loop = asyncio.get_running_loop()
        self.engine = AsyncEngine(TappedPort(self.thread, name, fleet.tick), self._loop)
        self.connector = TappedConnector(fleet.fabric, self.epoch, self.runner.blocks, self.epoch, clock)
        self.connector.tick = lambda what: fleet.tick(f"{name} {what}")
        self.config = WorkerConfig(name=name, role=role, model=Path("fake"))
        self._parts = MemberParts(
            config=self.config,
            epoch=self.epoch,
            model_name="fake",
            fingerprint=fingerprint,
            runner=self.runner,
            engine=self.engine,
            connector=self.connector,
            clock=clock,
        )
        self.peers = Peers(self.connector, self._channels, self._parts.introduce, fingerprint)
        self.digests = BlockDigests(self.runner.layout, fleet.shape.digest_share, self.runner.blocks.__getitem__)
        self.blocks = BlockExchange(self._exchange(fleet), self._exchange_config(fleet))
        self.announcer = Announcer(self.digests)
        self.lifetimes = Lifetimes(self._channels, self._parts.introduce)
        self.reservations = Reservations(self.engine, clock, self.epoch, self.lifetimes)
        self._tasks = tasks
        self._expiry: asyncio.Task[None] | None = None
        self.prefill = self._prefill_parts(fleet)
        self.member = WorkerMember(self._parts, self.peers, self.blocks, begin_drain=lambda _: None)
        self.member.not_ready_reason = ""
        self.server = GrpcServer(name, "127.0.0.1", 0, new_work=NEW_WORK)

    def _exchange(self, fleet: "Fleet") -> ExchangeParts:
        caller = PoolCaller(name=self.name, epoch=self.epoch, fingerprint=FINGERPRINT, layout=self.runner.layout)
        links = LinkParts(
            channels=self._channels, connector=self.connector, peers=self.peers, caller=caller, clock=fleet.clock
        )
        return ExchangeParts(engine=self.engine, tasks=fleet.tasks, links=links, digests=self.digests)

    def _exchange_config(self, fleet: "Fleet") -> ExchangeConfig:
        return ExchangeConfig(stores=fleet.kvstores, deadline_s=2.0, cost=fleet.shape.cost, chunk_tokens=8)

    def _prefill_parts(self, fleet: "Fleet") -> PrefillParts:
        return PrefillParts(
            engine=self.engine,
            connector=self.connector,
            peers=self.peers,
            channels=self._channels,
            blocks=self.blocks,
            clock=fleet.clock,
            lifetimes=self.lifetimes,
            tasks=fleet.tasks,
            address=self.lane.address,
            epoch=self.epoch,
            block_tokens=BLOCK_TOKENS,
            block_bytes=self.runner.blocks.shape[1],
            transfer_deadline_s=fleet.shape.transfer_deadline_s,
            push_whole=False,
        )

    def _note_change(self, change: CacheChange) -> None:
        """Runs on the engine's thread."""
        with contextlib.suppress(RuntimeError):  # The loop has closed.
            self._loop.call_soon_threadsafe(lambda: self.announcer.note(change))

    async def start(self) -> None:
        """Serve behind the lane."""
        decode = DecodeParts(engine=self.engine, blocks=self.blocks, reservations=self.reservations, tasks=self._tasks)
        servicer = DecodeServicer(decode, self.lane.address, self.epoch)
        self.server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, ClusterServicer(self.member))
        self.server.add(decode_pb2_grpc.add_DecodeServiceServicer_to_server, servicer)
        self.server.add(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, PrefillServicer(self.prefill))
        self.server.add(pool_pb2_grpc.add_PoolServiceServicer_to_server, self._pool_servicer())
        await self.server.start()
        self.lane.connect(self.server.port)
        self.thread.start()
        self._expiry = self._tasks.create_task(self.reservations.run_expiry())

    def _pool_servicer(self) -> PoolServicer:
        reads = Reads(self.engine, self._parts.clock, self.epoch, lambda: secrets.token_hex(16))
        return PoolServicer(reads, self._parts, self.digests, self.announcer.note_corrupt)

    async def kill(self) -> None:
        """Make the worker look killed: connections drop, transfers with it end, its engine is gone."""
        # First of all it falls silent: it must not tell anybody how its calls and transfers end.
        await self._channels.close()
        self._fabric.kill(self.epoch)
        await self.lane.cut()
        await self.stop()

    async def stop(self) -> None:
        """End the worker."""
        self.runner.gate.set()
        if self._expiry is not None:
            self._expiry.cancel()
        await self.connector.close()
        await self.server.stop()
        await asyncio.to_thread(self.thread.stop)
        await self._channels.close()

    def left(self) -> str:
        """Return what is held here, or nothing when all is at rest."""
        stats = self.engine.stats()
        held = {
            "leased": stats.leased_blocks,
            "leases": stats.num_leases,
            "sequences": stats.num_running + stats.num_waiting,
            "writers": self.reservations.num_writers(),
            "inflight": self.connector.stats().num_inflight,
            "calls": self.server.num_running,
        }
        return ", ".join(f"{self.name} {name}={count}" for name, count in held.items() if count)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetShape:
    """What a fleet is like.

    Attributes:
        kvstore: Whether there is a kvstore.
        num_kvstores: Number of them.
        digest_share: Share of blocks whose bytes are checked when they were read.
        cost: What steps cost, for the choice between fetching and computing; None fetches all.
        max_live: Admission bound of the router.
        num_blocks: Size of each worker's pool.
        num_swap_blocks: Blocks of preempted sequences that each keeps; the KV of the others is computed again.
        order: Makes each worker's order.
        preempt: What becomes of the KV of the preempted.
        stall_s: Silence after which an open prompt has stalled.
        transfer_deadline_s: Patience of a push.
        canary_interval_s: Longest age of the router's last token before it sends a canary.
        direct: Whether the router reaches workers without a lane between, for measurements.
    """

    kvstore: bool = False
    num_kvstores: int = 1
    digest_share: float = 1.0
    cost: CostModel | None = None
    max_live: int = 256
    num_blocks: int = 64
    num_swap_blocks: int = 0
    order: Callable[[], OrderPolicy] = partial(make_order, "fcfs")
    preempt: PreemptPolicy = field(default_factory=SwapAlways)
    stall_s: float = 1.0
    transfer_deadline_s: float = 5.0
    canary_interval_s: float = 15.0
    direct: bool = False


class Fleet:
    """Workers and the router's parts.

    Attributes:
        workers: By name.
        kvstores: Addresses of the kvstores.
        stores: Their parts, by address.
        live: The front door.
        index: What the router believes of caches; empty unless a test tells it.
        on_tick: Hears the name of every step of the protocol; may be called on an engine's thread.
    """

    def __init__(self, shape: FleetShape, tasks: asyncio.TaskGroup, clock: Clock) -> None:
        self.shape = shape
        self.fabric, self.tasks, self.clock = Fabric(), tasks, clock
        self.channels, self.store_channels = Channels(), Channels()
        self.workers: dict[str, FleetWorker] = {}
        self.kvstores: tuple[str, ...] = ()
        self.stores: dict[str, KvStoreParts] = {}
        self.index = PrefixIndex(budget_bytes=1 << 20, max_locations=64)
        self.on_tick: Tick = lambda _: None
        self.table: WorkerTable
        self.parts: SequenceParts
        self.live: LiveRequests
        self._num_epochs = 0
        self._num_sequences = 0
        self._follows: dict[str, asyncio.Task[None]] = {}

    def next_epoch(self) -> int:
        """Return a number that no worker had."""
        self._num_epochs += 1
        return self._num_epochs

    def tick(self, what: str) -> None:
        """Tell of a step of the protocol."""
        self.on_tick(what)

    async def start(self, roles: dict[str, WorkerRole], folder: Path) -> None:
        """Start workers and router."""
        for name, role in roles.items():
            lane = FaultyLane()
            await lane.open()
            self.workers[name] = FleetWorker(self, name, role, lane)
            await self.workers[name].start()
        is_direct = self.shape.direct
        addresses = tuple(each.server.address if is_direct else each.lane.address for each in self.workers.values())
        self.table = WorkerTable(
            name="router", addresses=addresses, channels=self.channels, clock=self.clock, report_timeout_s=1.0
        )
        self.parts = SequenceParts(
            table=self.table,
            channels=self.channels,
            clock=self.clock,
            tasks=self.tasks,
            prefixes=Prefixes(self.index) if self.kvstores else None,
            drift=HitDrift(alarm_at=0.3),
            max_moves=3,
        )
        config = RouterConfig(
            model=folder, max_live_requests=self.shape.max_live, canary_interval_s=self.shape.canary_interval_s
        )
        metrics = RouterMetrics(CollectorRegistry(), self.clock)
        self.live = LiveRequests(config, self.parts, byte_text_model(folder), self.clock, metrics)
        self.table.on_meet = self.live.meet
        for address in addresses:
            self._follows[address] = self.tasks.create_task(self.table.follow(address))
        await self.until(lambda: len(self.table.usable()) == len(addresses), "workers not met")

    async def revive(self, name: str, *, fingerprint: str = FINGERPRINT) -> None:
        """Start a killed worker anew, at its address, maybe with another model."""
        old = self.workers[name]
        self.workers[name] = FleetWorker(self, name, old.role, old.lane, fingerprint)
        await self.workers[name].start()
        await old.lane.restore(self.workers[name].server.port)

    def hold_at(self, what: str, count: int) -> asyncio.Event:
        """Stop a worker's engine before its next step when something has happened there so often.

        Args:
            what: Name of the worker and of a command or event, as in "d0 Sampled".
            count: How often.

        Returns:
            Set when it has happened.
        """
        happened, loop = asyncio.Event(), asyncio.get_running_loop()
        seen: list[str] = []
        runner = self.workers[what.partition(" ")[0]].runner

        def look(tick: str) -> None:
            if tick == what:
                seen.append(tick)
                if len(seen) == count:
                    runner.gate.clear()
                    loop.call_soon_threadsafe(happened.set)

        self.on_tick = look
        return happened

    async def stop(self) -> None:
        """End everything."""
        for follow in self._follows.values():
            follow.cancel()
        for worker in self.workers.values():
            await worker.stop()
            await worker.lane.cut()
        await self.channels.close()
        await self.store_channels.close()

    def spec(self, prompt: Sequence[int], *, timeout_s: float = 30.0, **sampling: object) -> SequenceSpec:
        """Return a sequence with a name of its own; greedy and eight tokens unless said otherwise."""
        self._num_sequences += 1
        params: dict[str, object] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **sampling}
        return SequenceSpec(
            sequence_id=SequenceId(f"s{self._num_sequences}"),
            model="fake",
            prompt=tuple(prompt),
            sampling=SamplingParams(**params),  # type: ignore[arg-type]  # names are checked by the dataclass
            deadline_unix_ms=self.clock.unix_ms() + int(timeout_s * 1000),
        )

    def run(self, spec: SequenceSpec) -> SequenceRun:
        """Return the run of a sequence through the cluster."""
        return SequenceRun(self.parts, spec, FINGERPRINT, BLOCK_TOKENS)

    def context(self, spec: SequenceSpec) -> ContextRun:
        """Return the run of a context through the cluster."""
        return ContextRun(self.parts, spec, FINGERPRINT, BLOCK_TOKENS)

    async def tokens(self, spec: SequenceSpec) -> list[Token]:
        """Return a sequence's tokens."""
        found: list[Token] = []
        async with aclosing(self.run(spec).batches()) as batches:
            async for batch in batches:
                found.extend(batch.tokens)
        return found

    async def until(self, is_true: Callable[[], object], reason: str, limit_s: float = PATIENCE_S) -> None:
        """Wait for something that sets no event."""
        try:
            async with asyncio.timeout(limit_s):
                while not is_true():  # noqa: ASYNC110 what is waited for is a counter
                    await asyncio.sleep(0.002)
        except TimeoutError:
            raise AssertionError(reason) from None

    async def at_rest(self, *names: str) -> None:
        """Wait until no named worker (none named: all) holds anything, and no request's task is left."""
        watched = [self.workers[name] for name in names or self.workers]
        try:
            await self.until(lambda: not any(worker.left() for worker in watched), "", 5.0)
            # A failure is reported for 2.5 s to a decode worker that may be gone.
            await self.until(lambda: not self.request_tasks(), "", 5.0)
        except AssertionError:
            held = [*(worker.left() for worker in watched), *map(repr, self.request_tasks())]
            raise AssertionError("; ".join(filter(None, held))) from None

    def request_tasks(self) -> list["asyncio.Task[object]"]:
        """Return live tasks that some request started."""
        words = (
            "prefill_or_cancel",
            "_run_choice",
            "_push_chunks",
            "_report_failure",
            "._read",
            "Job.",
            "Attempt.",
            "follow_revisions",
        )
        return [
            task
            for task in asyncio.all_tasks()
            if not task.done() and any(word in getattr(task.get_coro(), "__qualname__", "") for word in words)
        ]


@asynccontextmanager
async def open_fleet(folder: Path, roles: dict[str, WorkerRole], **shape: object) -> AsyncIterator[Fleet]:
    """Serve a cluster on loopback until the block ends.

    Args:
        folder: Where its tokenizer is written.
        roles: Roles of the workers, by name.
        **shape: Attributes of `FleetShape`.
    """
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        fleet = Fleet(FleetShape(**shape), tasks, WallClock())  # type: ignore[arg-type]  # checked by the dataclass
        if fleet.shape.kvstore:
            config = KvStoreConfig(memory_bytes=1 << 20)
            for _ in range(fleet.shape.num_kvstores):
                store = fake_kvstore(fleet.fabric, config, fleet.clock, fleet.store_channels)
                server = await stack.enter_async_context(serve_kvstore(store))
                fleet.kvstores = (*fleet.kvstores, server.address)
                fleet.stores[server.address] = store
        try:
            await fleet.start(roles, folder)
            yield fleet
        finally:
            await fleet.stop()
