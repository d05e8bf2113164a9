"""One worker process: what it is made of, and what it says of itself."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass

from headrace.clock import Clock
from headrace.core.cost import CostModel
from headrace.core.placement import Tier
from headrace.core.request import PROTOCOL_VERSION, SamplingParams, SequenceId, SequenceSpec
from headrace.core.wire import layout_to_proto
from headrace.engine.batch import Runner
from headrace.engine.messages import EngineStats, Goal, Sampled
from headrace.errors import HeadraceError
from headrace.runtime.footprint import num_fds, num_tasks
from headrace.runtime.server import GrpcServer
from headrace.transfer.connector import Connector, PoolDescriptor
from headrace.transfer.measure import NUM_SCRATCH_BLOCKS, measure
from headrace.transfer.wire import pool_to_proto
from headrace.v1 import cluster_pb2
from headrace.worker.blocks import BlockExchange, Reuse
from headrace.worker.config import WorkerConfig, WorkerRole
from headrace.worker.engine import AsyncEngine
from headrace.worker.peers import Peers

logger = logging.getLogger(__name__)

CANARY_INTERVAL_S = 5.0
CANARY_TIMEOUT_S = 10.0
PEER_RETRY_S = 0.2

_ROLES = {
    WorkerRole.PREFILL: cluster_pb2.ROLE_PREFILL,
    WorkerRole.DECODE: cluster_pb2.ROLE_DECODE,
    WorkerRole.HYBRID: cluster_pb2.ROLE_HYBRID,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberParts:
    """What a worker reports of.

    Attributes:
        config: Name, role, address.
        epoch: Lifetime of this process.
        model_name: What requests call the model.
        fingerprint: Digest of weights, dtype, layout and kernels.
        runner: Layout and context length.
        engine: Source of load.
        connector: Source of the pool and of transfer counts.
        cost: What steps cost here; None if that was not measured.
    """

    config: WorkerConfig
    epoch: str
    model_name: str
    fingerprint: str
    runner: Runner
    engine: AsyncEngine
    connector: Connector
    clock: Clock
    cost: CostModel | None = None

    def introduce(self) -> cluster_pb2.HandshakeRequest:
        """Return what this worker says when it opens a connection."""
        return cluster_pb2.HandshakeRequest(
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint=self.fingerprint,
            name=self.config.name,
            role=_ROLES[self.config.role],
            epoch=self.epoch,
            pool=pool_to_proto(self.connector.pool),
            layout=layout_to_proto(self.runner.layout),
        )


class WorkerMember:
    """A worker as the cluster sees it; implements `runtime.cluster.Member`.

    Args:
        parts: What it reports of.
        peers: Connections to others.
        blocks: Source of what was reused.
        begin_drain: Asks the process to leave; gets the seconds that running work may go on.

    Attributes:
        is_draining: Whether the worker admits nothing new.
        not_ready_reason: Empty when the worker is ready.
    """

    def __init__(
        self, parts: MemberParts, peers: Peers, blocks: BlockExchange, begin_drain: Callable[[float], None]
    ) -> None:
        self._config = parts.config
        self._epoch = parts.epoch
        self._model_name = parts.model_name
        self._fingerprint = parts.fingerprint
        self._runner = parts.runner
        self._engine = parts.engine
        self._connector = parts.connector
        self._clock = parts.clock
        self._cost = parts.cost
        self._begin_drain = begin_drain
        self._peers = peers
        self._blocks = blocks
        self.is_draining = False
        self.not_ready_reason = "starting"

    def describe(self) -> cluster_pb2.HandshakeResponse:
        """Return identity, model and pool."""
        return cluster_pb2.HandshakeResponse(
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint=self._fingerprint,
            name=self._config.name,
            role=_ROLES[self._config.role],
            epoch=self._epoch,
            pool=pool_to_proto(self._connector.pool),
            layout=layout_to_proto(self._runner.layout),
            model=self._model_name,
            max_context_tokens=self._runner.max_context_tokens,
        )

    def load(self) -> cluster_pb2.LoadReport:
        """Return the load now."""
        stats, transfers = self._engine.stats(), self._connector.stats()
        return cluster_pb2.LoadReport(
            name=self._config.name,
            epoch=self._epoch,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            waiting_tokens=stats.waiting_tokens,
            ledger=_ledger(stats),
            num_transfers=transfers.num_inflight,
            num_tasks=num_tasks(),
            num_fds=num_fds(),
            num_steps=stats.num_steps,
            is_ready=not self.not_ready_reason,
            not_ready_reason=self.not_ready_reason,
            is_draining=self.is_draining,
            num_preemptions=stats.num_preemptions,
            computed_tokens=stats.computed_tokens,
            transferred_bytes=transfers.written_bytes + transfers.read_bytes,
            cost=None if self._cost is None else _cost(self._cost),
            reuse=_reuse(self._blocks.reuse()),
        )

    async def meet(self, caller: cluster_pb2.HandshakeRequest) -> None:
        """Nothing to note: whoever writes into this worker's blocks holds a reservation."""

    async def drain(self, grace_s: float) -> int:
        """Stop admitting and begin to leave; what still runs after `grace_s` is ended."""
        self.is_draining = True
        self._begin_drain(grace_s)
        return self._engine.stats().num_running

    async def measure(self, peer_address: str) -> cluster_pb2.MeasureTransportResponse:
        """Move scratch blocks to and from a peer's scratch blocks."""
        peer = await self._peers.refresh(peer_address)
        local = _scratch(self._connector.pool)
        remote = list(range(peer.pool.num_blocks - len(local), peer.pool.num_blocks))
        found = await measure(self._connector, peer.pool.agent_name, local, remote, self._clock)
        return cluster_pb2.MeasureTransportResponse(
            peer_name=peer.name,
            lane=found.lane,
            write_bytes_per_s=found.write_bytes_per_s,
            read_bytes_per_s=found.read_bytes_per_s,
            latency_us=found.latency_us,
        )

    async def keep_ready(self, server: GrpcServer) -> None:
        """Prove this worker's path with a real token at start and whenever none passed lately."""
        await self._meet_peers()
        num_seen = -1
        while True:
            num_steps = self._engine.stats().num_steps
            if num_steps == num_seen or self.not_ready_reason:
                self.not_ready_reason = await self._try_canary()
                num_steps = self._engine.stats().num_steps
                await server.set_ready(is_ready=not self.not_ready_reason, reason=self.not_ready_reason)
            num_seen = num_steps
            await self._meet_kvstores()
            await asyncio.sleep(PEER_RETRY_S if self.not_ready_reason else CANARY_INTERVAL_S)

    async def _meet_kvstores(self) -> None:
        """Meet a kvstore that was reborn before a request needs it."""
        for address in self._config.kvstores:
            with contextlib.suppress(HeadraceError):
                await self._peers.refresh(address)

    async def _meet_peers(self) -> None:
        """Connect configured peers once, so that no request pays for it; a dead one is met when it is needed."""
        for address in (*self._config.peers, *self._config.kvstores):
            self.not_ready_reason = f"starting: connecting {address}"
            deadline_s = self._clock.now() + CANARY_TIMEOUT_S
            while self._clock.now() < deadline_s:
                try:
                    await self._peers.ensure(address)
                    break
                except HeadraceError as error:
                    logger.info("peer not met", extra={"address": address, "error": error.code})
                    await asyncio.sleep(PEER_RETRY_S)

    async def _try_canary(self) -> str:
        """Generate one token in this worker's own engine; return why that failed, or nothing."""
        now_ms = self._clock.unix_ms()
        spec = SequenceSpec(
            sequence_id=SequenceId(f"canary-{self._config.name}-{now_ms}"),
            model=self._model_name,
            prompt=(0,),
            sampling=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
            deadline_unix_ms=now_ms + int(CANARY_TIMEOUT_S * 1000),
        )
        try:
            async with asyncio.timeout(CANARY_TIMEOUT_S), self._engine.open(spec, Goal.ANSWER) as sequence:
                sequence.begin(0)
                while not any(isinstance(event, Sampled) for event in await sequence.events()):
                    pass
        except TimeoutError:
            return "the canary token did not come in time"
        except HeadraceError as error:
            return f"the canary token failed: {error.code}"
        return ""


def _ledger(stats: EngineStats) -> cluster_pb2.LedgerReport:
    return cluster_pb2.LedgerReport(
        total=stats.total_blocks,
        free=stats.free_blocks,
        cached=stats.cached_blocks,
        leased=stats.leased_blocks,
        num_leases=stats.num_leases,
    )


def _cost(cost: CostModel) -> cluster_pb2.StepCost:
    return cluster_pb2.StepCost(**asdict(cost))


def _reuse(reuse: Reuse) -> cluster_pb2.ReuseReport:
    return cluster_pb2.ReuseReport(
        local_tokens=reuse.local_tokens,
        peer_tokens=reuse.fetched_tokens[Tier.DEVICE],
        dram_tokens=reuse.fetched_tokens[Tier.DRAM],
        disk_tokens=reuse.fetched_tokens[Tier.DISK],
        declined_tokens=reuse.declined_tokens,
        num_regretted=reuse.num_regretted,
        regretted_s=reuse.regretted_s,
        num_corrupt_blocks=reuse.num_corrupt_blocks,
        num_stored_blocks=reuse.num_stored_blocks,
        num_dropped_blocks=reuse.num_dropped_blocks,
    )


def _scratch(pool: PoolDescriptor) -> list[int]:
    return list(range(pool.num_blocks - NUM_SCRATCH_BLOCKS, pool.num_blocks))
