"""The router's table of workers: who is there, how loaded, and what was just sent there."""

import asyncio
import logging
from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass, field

from headrace.clock import Clock
from headrace.core.request import PROTOCOL_VERSION
from headrace.errors import HeadraceError, PeerFailed, PeerMismatch
from headrace.router.policy import WorkerView
from headrace.runtime.channels import Channels, translate_errors
from headrace.runtime.cluster import check_peer
from headrace.v1 import cluster_pb2, cluster_pb2_grpc

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 2.0
RECONNECT_S = 0.2
REPORT_INTERVAL_MS = 500
CHARGE_S = 0.1
"""Time after which a sequence sent to a worker shows in what the worker says of itself."""


@dataclass(slots=True, kw_only=True)
class Worker:
    """One configured process as the router sees it.

    Attributes:
        identity: Its last handshake; None until met.
        load: Its last report.
        is_connected: Whether reports arrive.
        reserved: Prompt tokens of each sequence sent there since its last report, by sequence id.
    """

    address: str
    identity: cluster_pb2.HandshakeResponse | None = None
    load: cluster_pb2.LoadReport = field(default_factory=cluster_pb2.LoadReport)
    is_connected: bool = False
    reserved: dict[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name, or its address until it has been met."""
        return self.identity.name if self.identity is not None else self.address

    @property
    def role(self) -> "cluster_pb2.Role.ValueType":
        """What it does, once it has been met."""
        return self.identity.role if self.identity is not None else cluster_pb2.ROLE_UNSPECIFIED

    @property
    def is_usable(self) -> bool:
        """Whether it may get work."""
        return self.is_connected and self.load.is_ready and not self.load.is_draining

    def view(self) -> WorkerView:
        """Return what the policy may know."""
        role = self.role
        ledger = self.load.ledger
        return WorkerView(
            name=self.name,
            prefers_prefill=role in (cluster_pb2.ROLE_PREFILL, cluster_pb2.ROLE_HYBRID),
            prefers_decode=role in (cluster_pb2.ROLE_DECODE, cluster_pb2.ROLE_HYBRID),
            num_sequences=self.load.num_running + self.load.num_waiting,
            waiting_tokens=self.load.waiting_tokens,
            reserved_sequences=len(self.reserved),
            reserved_tokens=sum(tokens for _, tokens in self.reserved.values()),
            free_share=(ledger.free + ledger.cached) / ledger.total if ledger.total else 1.0,
        )


class WorkerTable:
    """Meets every configured process, follows its load, and notices its death.

    Args:
        name: Name of the router.
        addresses: Workers, kvstores and ingestors.
        channels: gRPC channels by address.
        clock: Ages reservations.
        report_timeout_s: Silence after which a worker counts as dead.

    Attributes:
        members: By address.
        on_meet: Called after each handshake; set before `follow`.
    """

    def __init__(
        self,
        *,
        name: str,
        addresses: tuple[str, ...],
        channels: Channels,
        clock: Clock,
        report_timeout_s: float,
    ) -> None:
        self._name = name
        self._channels = channels
        self._clock = clock
        self._report_timeout_s = report_timeout_s
        self.on_meet: Callable[[cluster_pb2.HandshakeResponse], None] = lambda _: None
        self.members = {address: Worker(address=address) for address in addresses}

    def usable(self) -> list[Worker]:
        """Return the workers that may get work."""
        return self._usable(cluster_pb2.ROLE_PREFILL, cluster_pb2.ROLE_DECODE, cluster_pb2.ROLE_HYBRID)

    def stores(self) -> list[Worker]:
        """Return the kvstores that can be asked for blocks."""
        return self._usable(cluster_pb2.ROLE_KVSTORE)

    def ingestors(self) -> list[Worker]:
        """Return the ingestors that take contexts in."""
        return self._usable(cluster_pb2.ROLE_INGESTOR)

    def _usable(self, *roles: "cluster_pb2.Role.ValueType") -> list[Worker]:
        return [member for member in self.members.values() if member.role in roles and member.is_usable]

    def by_name(self, name: str) -> Worker:
        """Return a member.

        Raises:
            PeerFailed: no such member has been met.
        """
        for member in self.members.values():
            if member.identity is not None and member.identity.name == name:
                return member
        raise PeerFailed(f"worker {name} is not known")

    def reserve(self, name: str, sequence_id: str, num_tokens: int) -> None:
        """Charge a sequence to a worker at the moment of choosing, until its own report shows it."""
        self.by_name(name).reserved[sequence_id] = (self._clock.now(), num_tokens)

    def release(self, name: str, sequence_id: str) -> None:
        """Take a charge back; unknown ones are ignored."""
        for member in self.members.values():
            if member.name == name:
                member.reserved.pop(sequence_id, None)

    def suspect(self, name: str) -> None:
        """Send nothing more to a worker until it reports again: a call to it has just failed."""
        for member in self.members.values():
            if member.name == name:
                member.is_connected = False

    async def follow(self, address: str) -> None:
        """Keep one member's entry current until cancelled."""
        member = self.members[address]
        while True:
            try:
                await self._follow_once(member)
            except PeerMismatch as error:
                logger.error("peer refused", extra={"address": address, "reason": str(error)})
            except HeadraceError as error:
                logger.info("peer lost", extra={"address": address, "error": error.code})
            member.is_connected = False
            member.reserved.clear()
            await asyncio.sleep(RECONNECT_S)

    async def _follow_once(self, member: Worker) -> None:
        stub = cluster_pb2_grpc.ClusterServiceStub(self._channels.get(member.address))
        async with translate_errors(member.address):
            hello = cluster_pb2.HandshakeRequest(
                protocol_version=PROTOCOL_VERSION, name=self._name, role=cluster_pb2.ROLE_ROUTER
            )
            identity = await stub.Handshake(hello, timeout=HANDSHAKE_TIMEOUT_S)
            check_peer(identity, self._fingerprint_of_others(member))
            member.identity = identity
            self.on_meet(identity)
            reports = stub.WatchLoad(cluster_pb2.WatchLoadRequest(interval_ms=REPORT_INTERVAL_MS))
            try:
                await self._read_reports(member, reports)
            finally:
                reports.cancel()

    async def _read_reports(self, member: Worker, reports: AsyncIterable[cluster_pb2.WatchLoadResponse]) -> None:
        stream = aiter(reports)
        while True:
            try:
                # Not wait_for: in Python 3.11 it swallows a cancellation that meets a result.
                async with asyncio.timeout(self._report_timeout_s):
                    report = await anext(stream)
            except (TimeoutError, StopAsyncIteration):
                raise PeerFailed(f"no report from {member.address}") from None
            self._note(member, report.load)

    def _note(self, member: Worker, load: cluster_pb2.LoadReport) -> None:
        if load.epoch != (member.identity.epoch if member.identity else ""):
            raise PeerFailed(f"{member.address} was restarted")
        member.load = load
        member.is_connected = True
        seen_before_s = self._clock.now() - CHARGE_S
        member.reserved = {key: entry for key, entry in member.reserved.items() if entry[0] > seen_before_s}

    def _fingerprint_of_others(self, member: Worker) -> str:
        for other in self.members.values():
            if other is not member and other.is_connected and other.identity and other.identity.model_fingerprint:
                return str(other.identity.model_fingerprint)
        return ""
