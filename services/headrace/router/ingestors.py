"""Contexts in text, passed on to the ingestors: the router is the one front door."""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing
from typing import TYPE_CHECKING

import grpc.aio

from headrace.core.tenancy import TENANT_HEADER
from headrace.errors import (
    Cancelled,
    HeadraceError,
    InvalidRequest,
    NotReady,
    UnknownContext,
)
from headrace.router.workers import WorkerTable
from headrace.runtime.channels import Channels, translate_errors
from headrace.runtime.incoming import first_of, tenant_of_call
from headrace.v1 import cluster_pb2, ingestor_pb2, ingestor_pb2_grpc

if TYPE_CHECKING:
    from headrace.client.context_link import ContextCall

logger = logging.getLogger(__name__)


class Ingestors:
    """Chooses the ingestor of a context, and calls it.

    Args:
        table: Knows the ingestors.
        channels: Connections to them.
        addresses: Of all that there are.
    """

    def __init__(self, table: WorkerTable, channels: Channels, addresses: Collection[str]) -> None:
        self._table = table
        self._addresses = addresses
        self._channels = channels
        self._numbers = itertools.count()

    def address_of(self, first: ingestor_pb2.StreamContextRequest) -> str:
        """Return who is to be called: the one that has a context, or for a new one the one with the fewest.

        Raises:
            InvalidRequest: the request neither opens a context nor takes one up again.
            UnknownContext: there is no such ingestor, so it has no such context.
            NotReady: there is none for a new context now, or not all have been met that may have the context.
        """
        if first.HasField("resume"):
            name = first.resume.context_id.partition(".")[0]
            for member in self._table.members.values():
                if member.role == cluster_pb2.ROLE_INGESTOR and member.name == name:
                    return member.address
            if any(self._table.members[address].identity is None for address in self._addresses):
                # This router has just started: the one that is meant may be among those not met yet.
                raise NotReady("not all ingestors have been met yet: retry shortly", retry_after_s=1.0)
            raise UnknownContext("there is no such context, or not any more", field="context_id")
        if not first.HasField("open"):
            raise InvalidRequest("the first request opens a context or takes one up again", field="request")
        ready = self._table.ingestors()
        if not ready:
            raise NotReady("no ingestor is connected and ready", retry_after_s=1.0)
        chosen = min(ready, key=lambda each: each.load.num_running + each.load.num_waiting + len(each.reserved))
        # It counts there until a report does: else all that are opened between two reports would go to one.
        self._table.reserve(chosen.name, f"context-{next(self._numbers)}", 0)
        return chosen.address

    def begin(self, address: str, tenant: str, timeout_s: float | None) -> "ContextCall":
        """Begin a call to an ingestor; nothing is sent yet."""
        stub: ingestor_pb2_grpc.IngestorServiceAsyncStub = ingestor_pb2_grpc.IngestorServiceStub(
            self._channels.get(address)
        )
        return stub.StreamContext(timeout=timeout_s, metadata=((TENANT_HEADER, tenant),))


class IngestorForwarder(ingestor_pb2_grpc.IngestorServiceServicer):
    """Serves IngestorService by passing every call on.

    Args:
        ingestors: Whom to call.
        tasks: Outlives every call.
        max_bytes: Largest request.
    """

    def __init__(self, ingestors: Ingestors, tasks: asyncio.TaskGroup, max_bytes: int) -> None:
        self._ingestors = ingestors
        self._tasks = tasks
        self._max_bytes = max_bytes

    async def StreamContext(
        self,
        request_iterator: AsyncIterator[ingestor_pb2.StreamContextRequest],
        context: "grpc.aio.ServicerContext[object, object]",
    ) -> AsyncGenerator[ingestor_pb2.StreamContextResponse, None]:
        """Pass requests on and responses back until either end leaves."""
        first, tenant = await first_of(request_iterator), tenant_of_call(context)
        if first is None:
            raise InvalidRequest("the first request opens a context or takes one up again", field="request")
        address = self._ingestors.address_of(first)
        call = self._ingestors.begin(address, tenant, context.time_remaining())
        passing = _Passing(call, first, request_iterator, self._max_bytes)
        task = self._tasks.create_task(passing.run())
        try:
            async with aclosing(_responses(call, address)) as responses:
                async for response in responses:
                    if response.HasField("opened"):
                        response.opened.max_request_bytes = self._max_bytes
                    yield response
        except HeadraceError:
            if passing.error is not None:
                raise passing.error from None
            raise
        finally:
            call.cancel()
            task.cancel()
            await asyncio.wait([task])


async def _responses(call: "ContextCall", address: str) -> AsyncGenerator[ingestor_pb2.StreamContextResponse, None]:
    async with translate_errors(address):
        async for response in call:
            yield response


class _Passing:
    """Passes the requests of a client on.

    Attributes:
        error: Why it ended the call, if it did.
    """

    def __init__(
        self,
        call: "ContextCall",
        first: ingestor_pb2.StreamContextRequest,
        rest: AsyncIterator[ingestor_pb2.StreamContextRequest],
        max_bytes: int,
    ) -> None:
        self._call = call
        self._first = first
        self._rest = rest
        self._max_bytes = max_bytes
        self.error: HeadraceError | None = None

    async def run(self) -> None:
        """Go on until the client has no more to say, or the call has ended."""
        try:
            await self._write(self._first)
            async for request in self._rest:
                await self._write(request)
            await self._call.done_writing()
        except HeadraceError as error:
            self._give_up(error)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            # A call that has ended refuses writes in several ways; whoever reads it learns why.
            return
        except Exception as error:  # noqa: BLE001 bytes that are no message must not end the router's task group
            logger.info("context broke off", extra={"error": repr(error)})
            self._give_up(Cancelled("the stream of the context broke off"))

    def _give_up(self, error: HeadraceError) -> None:
        self.error = error
        self._call.cancel()

    async def _write(self, request: ingestor_pb2.StreamContextRequest) -> None:
        size = request.ByteSize()
        if size > self._max_bytes:
            raise InvalidRequest(
                f"the request has {size} bytes; at most {self._max_bytes} are allowed",
                field="request",
                limit=f"{self._max_bytes} bytes",
            )
        await self._call.write(request)
