"""The gRPC server of a process: errors, health, reflection, and an orderly end."""

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headrace.core.status import CONNECTION_OPTIONS, KEEPALIVE_MS, MAX_MESSAGE_BYTES
from headrace.errors import ConfigError
from headrace.runtime.interceptor import CallGate, ErrorInterceptor

logger = logging.getLogger(__name__)

ServicerT = TypeVar("ServicerT")

GIVE_UP_S = 1.0
"""Longest wait for calls that were given up to release what they hold and to tell their callers."""

SERVER_OPTIONS = (
    *CONNECTION_OPTIONS,
    # With gRPC's default two servers share one port in silence and each gets half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
)


class GrpcServer:
    """Owns one grpc.aio server, its health service and its running calls.

    Args:
        name: Name of this process; errors it raises carry it.
        host: Address to bind.
        port: Port to bind; 0 takes a free one.
        new_work: Full method names ("/headrace.v1.RouterService/Generate") that bring new work: they are
            refused while draining and waited for. All other calls go on, so that running work can end.
        max_message_bytes: Largest message that is taken in.
    """

    def __init__(
        self,
        name: str,
        host: str,
        port: int,
        new_work: Collection[str] = (),
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._host = host
        self._port = port
        # Of two of a name the first counts.
        self._options = (("grpc.max_receive_message_length", max_message_bytes), *SERVER_OPTIONS)
        self._gate = CallGate(frozenset(new_work))
        self._interceptor = ErrorInterceptor(name, self._gate)
        self._registrations: list[Callable[[grpc.aio.Server], None]] = []
        self._services: list[str] = []
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._not_ready_reason = "starting"

    def add(self, register: Callable[[ServicerT, grpc.aio.Server], None], servicer: ServicerT) -> None:
        """Add a service before `start`.

        Args:
            register: The generated `add_…Servicer_to_server`.
            servicer: Its implementation.
        """
        self._registrations.append(lambda server: register(servicer, server))

    @property
    def port(self) -> int:
        """The port bound; after `start`."""
        return self._port

    @property
    def address(self) -> str:
        """host:port bound; after `start`."""
        return f"{self._host}:{self._port}"

    @property
    def is_ready(self) -> bool:
        """What the health service answers."""
        return not self._not_ready_reason

    @property
    def not_ready_reason(self) -> str:
        """Why the health service says NOT_SERVING; empty when it does not."""
        return self._not_ready_reason

    @property
    def is_draining(self) -> bool:
        """Whether new work is refused."""
        return self._gate.is_draining

    @property
    def num_running(self) -> int:
        """Running calls that brought work."""
        return self._gate.num_running

    async def start(self) -> None:
        """Bind and answer calls; health says NOT_SERVING until `set_ready`.

        Raises:
            ConfigError: the port is taken or the host is not an address of this machine.
        """
        server = grpc.aio.server(interceptors=(self._interceptor,), options=self._options)
        recorder = _Recorder(server)
        for registration in self._registrations:
            registration(cast(grpc.aio.Server, recorder))
        self._services = recorder.names
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        await self._publish(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self._port = server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {self._host}:{self._port}: {error}; choose a free port", field="grpc_port"
            ) from None
        await server.start()
        self._server = server
        logger.info("gRPC server started", extra={"address": self.address, "services": self._services})

    async def set_ready(self, *, is_ready: bool, reason: str = "") -> None:
        """Say whether this process can do its work; health checks and watchers hear of it.

        Args:
            is_ready: Whether it can. Ignored while draining.
            reason: Why it cannot.
        """
        if not self._gate.is_draining:
            await self._show("" if is_ready else reason or "not ready")

    async def drain(self, grace_s: float) -> int:
        """Refuse new work with Draining and wait for running work to end.

        Returns:
            How many calls that brought work still run after `grace_s`.
        """
        self._gate.is_draining = True
        await self._show("draining")
        try:
            async with asyncio.timeout(grace_s):
                await self._gate.idle.wait()
        except TimeoutError:
            logger.warning("drain ran out of time", extra={"num_running": self._gate.num_running})
        return self._gate.num_running

    async def stop(self, grace_s: float = 0.0) -> None:
        """Accept no call any more, give running ones `grace_s`, cancel the rest.

        After a drain the callers of what still runs get Draining, which tells them to go elsewhere.
        """
        await self._show("stopping")
        if self._gate.is_draining:
            await self.give_up()
        if self._server is not None:
            await self._server.stop(grace_s)
            self._server = None

    async def give_up(self) -> None:
        """End the calls that brought work with Draining, and wait a second for what they hold; after `drain`."""
        self._gate.give_up()
        try:
            async with asyncio.timeout(GIVE_UP_S):
                await self._gate.idle.wait()
        except TimeoutError:
            logger.warning("calls do not end", extra={"num_running": self._gate.num_running})

    async def _show(self, not_ready_reason: str) -> None:
        if not_ready_reason == self._not_ready_reason:
            return
        self._not_ready_reason = not_ready_reason
        logger.info("readiness changed", extra={"is_ready": self.is_ready, "reason": not_ready_reason})
        status = health_pb2.HealthCheckResponse
        await self._publish(status.SERVING if self.is_ready else status.NOT_SERVING)

    async def _publish(self, status: "health_pb2.HealthCheckResponse.ServingStatus.ValueType") -> None:
        for service in ("", *self._services):
            await self._health.set(service, status)


class _Recorder:
    """Stands before a server while services register, and notes their names for health and reflection."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self.names: list[str] = []
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:  # noqa: ANN401 gRPC gives it no type
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service_name: str, handlers: Any) -> None:  # noqa: ANN401 as above
        self.names.append(service_name)
        self._server.add_registered_method_handlers(service_name, handlers)
