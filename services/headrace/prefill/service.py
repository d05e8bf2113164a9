"""PrefillService on the wire: translates and decides nothing."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import grpc.aio

from headrace.core.wire import spec_from_proto
from headrace.prefill.context_job import ContextJob
from headrace.prefill.job import PrefillJob
from headrace.prefill.parts import PrefillParts
from headrace.v1 import prefill_pb2, prefill_pb2_grpc
from headrace.worker.context import not_opened


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Run one job per call; cancelling the call cancels the job."""

    def __init__(self, parts: PrefillParts) -> None:
        self._parts = parts

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> prefill_pb2.PrefillResponse:
        """Compute a prompt, push its KV and hand over the first token."""
        job = PrefillJob(self._parts, spec_from_proto(request.sequence), request.target, request.writer_id)
        return await job.run()

    async def PrefillContext(
        self,
        request_iterator: AsyncIterator[prefill_pb2.PrefillContextRequest],
        context: grpc.aio.ServicerContext[object, object],
    ) -> AsyncGenerator[prefill_pb2.PrefillContextResponse, None]:
        """Compute a prompt that still arrives, push its KV and hand over the first token."""
        opening = await anext(request_iterator, None)
        if opening is None or not opening.HasField("open"):
            raise not_opened()
        job = ContextJob(self._parts, spec_from_proto(opening.open), opening.final_tokens)
        async with aclosing(job.run(request_iterator)) as messages:
            async for message in messages:
                yield message
