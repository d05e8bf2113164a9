"""IngestorService on the wire: translates and decides nothing."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import grpc.aio

from headrace.errors import InvalidRequest
from headrace.ingestor.call import ContextCall
from headrace.ingestor.parts import IngestParts
from headrace.ingestor.session import Session
from headrace.ingestor.sessions import Sessions, Wanted
from headrace.ingestor.wire import mode_from_proto
from headrace.runtime.incoming import first_of, tenant_of_call
from headrace.v1 import ingestor_pb2, ingestor_pb2_grpc


class IngestorServicer(ingestor_pb2_grpc.IngestorServiceServicer):
    """Translate IngestorService to sessions.

    Args:
        sessions: The contexts.
        parts: What they share.
    """

    def __init__(self, sessions: Sessions, parts: IngestParts) -> None:
        self._sessions = sessions
        self._parts = parts

    async def StreamContext(
        self,
        request_iterator: AsyncIterator[ingestor_pb2.StreamContextRequest],
        context: "grpc.aio.ServicerContext[object, object]",
    ) -> AsyncGenerator[ingestor_pb2.StreamContextResponse, None]:
        """Open a context or take one up again; cancelling the call leaves it as it is."""
        first, tenant = await first_of(request_iterator), tenant_of_call(context)
        session, cursor = await self._session(first, tenant, context.time_remaining())
        call = ContextCall(session, cursor, self._parts.tasks)
        async with aclosing(call.responses(request_iterator)) as responses:
            async for response in responses:
                yield response

    async def _session(
        self, first: ingestor_pb2.StreamContextRequest | None, tenant: str, remaining_s: float | None
    ) -> tuple[Session, int]:
        if first is not None and first.HasField("resume"):
            return self._sessions.resume(first.resume.context_id, tenant), first.resume.cursor
        if first is None or not first.HasField("open"):
            raise InvalidRequest("the first request opens a context or takes one up again", field="request")
        opening = first.open
        timeout_s = opening.timeout_ms / 1000 or None
        if timeout_s is None and remaining_s is not None and not opening.is_unattended:
            timeout_s = min(remaining_s, self._parts.config.max_timeout_s)
        wanted = Wanted(
            request=opening.request,
            mode=mode_from_proto(opening.mode),
            timeout_s=timeout_s,
            is_unattended=opening.is_unattended,
            tenant=tenant,
        )
        return await self._sessions.open(wanted), 0
