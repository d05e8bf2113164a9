"""PrefillService on the wire: translates and decides nothing."""

import grpc.aio

from headrace.core.wire import spec_from_proto
from headrace.prefill.job import PrefillJob
from headrace.prefill.parts import PrefillParts
from headrace.v1 import prefill_pb2, prefill_pb2_grpc


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
