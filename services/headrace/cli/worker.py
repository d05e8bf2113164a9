"""Composition root of workers: one program for prefill, decode and hybrid.

Every worker answers both phases; its role only tells the router what to prefer. So a cluster that has
lost all workers of one role still serves.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from headrace.cli.policies import check_policies, make_pack, make_policies
from headrace.clock import Clock, WallClock
from headrace.core.block import blocks_for
from headrace.core.cost import CostModel
from headrace.decode.job import DecodeParts
from headrace.decode.reservations import Reservations
from headrace.decode.service import DecodeServicer
from headrace.engine.arena import KvArena
from headrace.engine.batch import Runner
from headrace.engine.calibrate import agrees, blocks_wanted, calibrate, checked_for, filled, probes_for
from headrace.engine.config import EngineConfig
from headrace.engine.cores import Cores
from headrace.engine.cost_file import CostFile, Instance
from headrace.engine.engine import Engine
from headrace.engine.kept_file import processor
from headrace.engine.messages import CacheChange
from headrace.engine.models.loader import Model, load_auto, load_model
from headrace.engine.models.native import NativeDecoder
from headrace.engine.models.row_paths import RowsDecoder
from headrace.engine.packing import PAD_TOKENS
from headrace.engine.runner import ModelRunner
from headrace.engine.thread import EngineThread
from headrace.errors import ConfigError
from headrace.prefill.parts import PrefillParts
from headrace.prefill.service import PrefillServicer
from headrace.runtime.channels import Channels
from headrace.runtime.cluster import ClusterServicer
from headrace.runtime.lifecycle import Lifecycle
from headrace.runtime.server import GrpcServer
from headrace.transfer.agent import Transport
from headrace.transfer.arena import Arena
from headrace.transfer.measure import NUM_SCRATCH_BLOCKS
from headrace.transfer.nixl import NixlConnector
from headrace.v1 import cluster_pb2_grpc, decode_pb2_grpc, pool_pb2_grpc, prefill_pb2_grpc
from headrace.worker.announcing import Announcer, publications
from headrace.worker.blocks import BlockExchange
from headrace.worker.config import Dtype, WorkerConfig, WorkerRole
from headrace.worker.digests import BlockDigests
from headrace.worker.engine import AsyncEngine
from headrace.worker.exchange_parts import ExchangeConfig, ExchangeParts
from headrace.worker.lifetimes import Lifetimes
from headrace.worker.peers import Peers
from headrace.worker.pool_link import LinkParts, PoolCaller
from headrace.worker.pool_service import PoolServicer
from headrace.worker.process import MemberParts, WorkerMember
from headrace.worker.reads import Reads
from headrace_kernels import native

ResultT = TypeVar("ResultT")

DRAIN_S = 10.0
WATCH_INTERVAL_S = 0.5
NEW_WORK = (
    "/headrace.v1.DecodeService/Decode",
    "/headrace.v1.DecodeService/DecodeContext",
    "/headrace.v1.PrefillService/Prefill",
    "/headrace.v1.PrefillService/PrefillContext",
    "/headrace.v1.PoolService/AcquireGet",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The parts of a worker that compute."""

    model: Model
    arena: KvArena
    runner: ModelRunner
    cores: Cores
    fingerprint: str
    cost: CostModel | None


def build_machine(config: WorkerConfig) -> Machine:
    """Load the model and allocate its blocks; takes seconds.

    Raises:
        ConfigError: the model cannot be served or the memory holds no block.
    """
    cores = Cores(
        config.threads or torch.get_num_threads(),
        config.shared_cores,
        comes_first=config.role is WorkerRole.PREFILL,
        give_way=config.give_way if config.role is WorkerRole.DECODE else 0.0,
    )
    folder = config.cache_dir or native.cache_dir()
    model = _load(config, cores, folder)
    layout = model.kv_layout(config.block_tokens)
    num_blocks = config.kv_memory_bytes // layout.block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"kv_memory_bytes of {config.kv_memory_bytes} holds no block of {layout.block_bytes} bytes",
            field="kv_memory_bytes",
        )
    pack = make_pack(config.pack)
    num_pad_blocks = 0 if pack is None else blocks_for(PAD_TOKENS, config.block_tokens)
    arena = KvArena(layout, num_blocks + NUM_SCRATCH_BLOCKS, model.device, num_pad_blocks=num_pad_blocks)
    fingerprint = model.fingerprint(layout)
    runner = ModelRunner(model, arena, cores.share, pack)
    kept = CostFile(folder, _instance(config, model, fingerprint))
    cost = step_cost(runner, arena, cores, config.calibrate_s, kept, WallClock(), _wide_from(model))
    return Machine(model=model, arena=arena, runner=runner, cores=cores, fingerprint=fingerprint, cost=cost)


def _load(config: WorkerConfig, cores: Cores, folder: Path) -> Model:
    """Load the model as `dtype` says; only `auto` chooses by what it measures."""
    device = torch.device(config.device)
    if config.dtype is Dtype.AUTO:
        return load_auto(config.model, folder, device=device, cores=cores, clock=WallClock())
    model = load_model(
        config.model,
        folder,
        dtype=torch.float32 if config.dtype is Dtype.FP32 else torch.bfloat16,
        device=device,
        quantised=config.dtype in {Dtype.INT4, Dtype.INT8},
        input_bits=8 if config.dtype is Dtype.INT8 else 16,
    )
    if config.dtype is Dtype.INT4 and not model.is_quantised:
        raise ConfigError(
            "the weights of this model have no quantised grid that this device computes on", field="dtype"
        )
    return model


def _instance(config: WorkerConfig, model: Model, fingerprint: str) -> Instance:
    return Instance(
        fingerprint=fingerprint,
        device=config.device,
        threads=config.threads or torch.get_num_threads(),
        pack=config.pack.value,
        processor=processor(),
        kernels=_kernels(model),
    )


def _kernels(model: Model) -> str:
    match model.decoder:
        case NativeDecoder():
            return native.build().name
        case RowsDecoder(torch_from=rows):
            return f"{native.build().name}, torch from {rows} rows"
        case _:
            return ""


def _wide_from(model: Model) -> int:
    """Return the rows from which on a step is computed another way; 0 if there is one way."""
    return model.decoder.torch_from if isinstance(model.decoder, RowsDecoder) else 0


def step_cost(  # noqa: PLR0913 a machine's parts
    runner: Runner, arena: KvArena, cores: Cores, limit_s: float, kept: CostFile, clock: Clock, wide_from: int = 0
) -> CostModel | None:
    """Return what steps cost: as an earlier start kept it, if a few steps agree, else measured for `limit_s`.

    It happens in blocks that no engine owns yet; workers that start together take turns, as far as that helps.
    """
    if limit_s <= 0:
        return None
    block_tokens = arena.layout.block_tokens
    num_checked = min(arena.num_blocks, blocks_wanted(block_tokens, checked_for(wide_from)))
    num_blocks = min(arena.num_blocks, blocks_wanted(block_tokens, probes_for(wide_from)))
    with cores.turn(limit_s), cores:
        known = kept.read()
        if known is not None and known.wide_from == wide_from:
            with filled(arena, num_checked):
                if agrees(known, runner, num_checked, clock):
                    return known
        with filled(arena, num_blocks):
            cost = calibrate(runner, num_blocks, clock, limit_s, wide_from)
    if cost is not None:
        kept.write(cost)
    return cost


def build_engine(config: WorkerConfig, machine: Machine, on_cache_change: Callable[[CacheChange], None]) -> Engine:
    """Return a new engine over all blocks of a machine.

    Args:
        config: Settings of the worker.
        machine: What it computes with.
        on_cache_change: Hears what came into and left the prefix cache, on the thread that steps the engine.
    """
    bounds = EngineConfig(
        num_blocks=machine.arena.num_blocks - NUM_SCRATCH_BLOCKS,
        token_budget=config.token_budget,
        max_running=config.max_running,
        fingerprint=machine.fingerprint,
        cost=machine.cost if machine.cost is not None and machine.cost.is_sound else None,
        describes_stored=bool(config.vllm_events.endpoint),
        num_swap_blocks=config.swap_memory_bytes // machine.arena.block_bytes,
        stall_s=config.stall_s,
    )
    policies = make_policies(config, machine.cost)
    return Engine(
        machine.runner,
        bounds,
        order=policies.order,
        shape=policies.shape,
        preempt=policies.preempt,
        clock=WallClock(),
        on_cache_change=on_cache_change,
    )


def build(config: WorkerConfig, on_cache_change: Callable[[CacheChange], None]) -> tuple[Machine, Engine]:
    """Do all that computes before the engine's first step; arguments and errors as of the two that it calls."""
    machine = build_machine(config)
    return machine, build_engine(config, machine, on_cache_change)


class CacheChanges:
    """Carries changes of the prefix cache from the engine's thread to the loop.

    Attributes:
        listener: Called on the loop; set before the engine starts.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.listener: Callable[[CacheChange], None] = lambda _: None

    def __call__(self, change: CacheChange) -> None:
        """Hand a change over; called on the engine's thread."""
        with contextlib.suppress(RuntimeError):  # The loop has closed: the process is leaving.
            self._loop.call_soon_threadsafe(self.listener, change)


async def serve(config: WorkerConfig, lifecycle: Lifecycle, transport: Transport, epoch: str) -> None:
    """Run a worker until the process is asked to leave.

    Args:
        config: Its settings.
        lifecycle: Tells when to leave.
        transport: What its blocks travel by; nothing is registered yet.
        epoch: Lifetime of this process.
    """
    check_policies(config)
    changes = CacheChanges(asyncio.get_running_loop())
    machine, engine = await in_own_thread(partial(build, config, changes))
    thread = EngineThread(engine, WallClock(), machine.cores)
    async with Channels() as channels, asyncio.TaskGroup() as tasks:
        connector = NixlConnector(transport, _transfer_arena(machine.arena), epoch, WallClock())
        parts = _assemble(config, machine, thread, connector, channels, tasks)
        changes.listener = parts.announcer.note
        member = WorkerMember(parts.member, parts.peers, parts.blocks, begin_drain=partial(lifecycle.stop, "drain"))
        server = _server(config, parts, member)
        await server.start()
        parts.thread.start()
        background = [
            tasks.create_task(member.keep_ready(server)),
            tasks.create_task(parts.blocks.run_stores()),
            tasks.create_task(parts.announcer.run()),
            tasks.create_task(parts.reservations.run_expiry()),
            tasks.create_task(_watch(parts.thread, lifecycle)),
        ]
        await lifecycle.stopped()
        member.is_draining = True
        await server.drain(lifecycle.grace_s(DRAIN_S))
        await server.give_up()
        # Before the port: a refused connection tells peers that nothing is written from here any more.
        await parts.connector.close()
        await server.stop()
        for task in background:
            task.cancel()
        await parts.announcer.close()
        await asyncio.to_thread(parts.thread.stop)


async def in_own_thread(work: Callable[[], ResultT]) -> ResultT:
    """Run in a thread that ends with its work, so that its OpenMP threads end too.

    Every thread that computes with torch gets OpenMP threads of its own, and with more of them than cores in a
    process, sleeping ones included, GNU OpenMP waits by sleeping: a decode step took 54 instead of 39 ms (2-core
    Zen 3, bf16, 2026-11-21), 256 tokens of a prompt 165 instead of 90 (2-core Xeon, bf16, 2026-11-22).
    """
    thread = ThreadPoolExecutor(1)
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, work)
    finally:
        thread.shutdown(wait=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of a worker that talk."""

    thread: EngineThread
    connector: NixlConnector
    peers: Peers
    blocks: BlockExchange
    digests: BlockDigests
    announcer: Announcer
    reservations: Reservations
    member: MemberParts
    prefill: PrefillParts


def _assemble(
    config: WorkerConfig,
    machine: Machine,
    thread: EngineThread,
    connector: NixlConnector,
    channels: Channels,
    tasks: asyncio.TaskGroup,
) -> Parts:
    clock, epoch, loop = WallClock(), connector.pool.epoch, asyncio.get_running_loop()
    engine = AsyncEngine(thread, loop)
    member = MemberParts(
        config=config,
        epoch=epoch,
        model_name=config.served_name,
        fingerprint=machine.fingerprint,
        runner=machine.runner,
        engine=engine,
        connector=connector,
        clock=clock,
        cost=machine.cost,
    )
    peers = Peers(connector, channels, member.introduce, machine.fingerprint)
    lifetimes = Lifetimes(channels, member.introduce)
    digests = BlockDigests(machine.runner.layout, config.digest_share, machine.arena.block_bytes_of)
    exchange = ExchangeParts(engine=engine, tasks=tasks, links=_links(member, peers, channels), digests=digests)
    blocks = BlockExchange(exchange, exchange_config(config, machine.cost))
    announcer = Announcer(digests, publications(config, epoch, machine.fingerprint, clock))
    blocks.fetcher.on_corrupt = announcer.note_corrupt
    prefill = PrefillParts(
        engine=engine,
        connector=connector,
        peers=peers,
        channels=channels,
        blocks=blocks,
        clock=clock,
        lifetimes=lifetimes,
        tasks=tasks,
        address=_address(config),
        epoch=epoch,
        block_tokens=config.block_tokens,
        block_bytes=machine.arena.block_bytes,
        transfer_deadline_s=config.transfer_deadline_s,
        push_whole=config.push_whole,
    )
    return Parts(
        thread=thread,
        connector=connector,
        peers=peers,
        blocks=blocks,
        digests=digests,
        announcer=announcer,
        reservations=Reservations(engine, clock, epoch, lifetimes),
        member=member,
        prefill=prefill,
    )


def _links(member: MemberParts, peers: Peers, channels: Channels) -> LinkParts:
    caller = PoolCaller(
        name=member.config.name,
        epoch=member.epoch,
        fingerprint=member.fingerprint,
        layout=member.runner.layout,
    )
    return LinkParts(channels=channels, connector=member.connector, peers=peers, caller=caller, clock=member.clock)


def exchange_config(config: WorkerConfig, cost: CostModel | None) -> ExchangeConfig:
    """Return how a worker fetches and stores blocks."""
    return ExchangeConfig(
        stores=config.kvstores,
        deadline_s=config.transfer_deadline_s,
        cost=cost,
        chunk_tokens=config.token_budget,
        early_start=config.early_start,
        stores_blocks=config.store_blocks,
        store_bytes_per_s=config.store_bytes_per_s,
    )


def _address(config: WorkerConfig) -> str:
    """Return where peers reach this process."""
    return f"{config.host}:{config.grpc_port}"


def _server(config: WorkerConfig, parts: Parts, member: WorkerMember) -> GrpcServer:
    server = GrpcServer(config.name, config.host, config.grpc_port, new_work=NEW_WORK)
    decode = DecodeServicer(
        DecodeParts(
            engine=parts.member.engine,
            blocks=parts.blocks,
            reservations=parts.reservations,
            tasks=parts.prefill.tasks,
        ),
        _address(config),
        parts.member.epoch,
    )
    server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, ClusterServicer(member))
    server.add(decode_pb2_grpc.add_DecodeServiceServicer_to_server, decode)
    server.add(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, PrefillServicer(parts.prefill))
    server.add(pool_pb2_grpc.add_PoolServiceServicer_to_server, _pool_servicer(parts))
    return server


def _pool_servicer(parts: Parts) -> PoolServicer:
    member = parts.member
    reads = Reads(member.engine, member.clock, member.epoch, lambda: secrets.token_hex(16))
    return PoolServicer(reads, member, parts.digests, parts.announcer.note_corrupt)


def _transfer_arena(arena: KvArena) -> Arena:
    return Arena(
        base_address=arena.base_address,
        block_bytes=arena.block_bytes,
        num_blocks=arena.num_blocks,
        owner=arena.data,
    )


async def _watch(thread: EngineThread, lifecycle: Lifecycle) -> None:
    """Leave when the engine's thread has died: a bug that a restart survives and a silent hang does not."""
    while thread.is_alive:  # noqa: ASYNC110 a thread sets no asyncio event when it dies
        await asyncio.sleep(WATCH_INTERVAL_S)
    lifecycle.stop("the engine's thread died")
