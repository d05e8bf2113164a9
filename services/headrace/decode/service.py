"""DecodeService on the wire: translates and decides nothing."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc.aio

from headrace.core.wire import spec_from_proto, token_from_proto, token_to_proto
from headrace.decode.job import DecodeJob, DecodeParts, Granted, Tokens
from headrace.decode.reservations import Origin, Reused
from headrace.errors import InvalidRequest
from headrace.v1 import block_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Run one job per stream; cancelling the stream ends the job.

    Args:
        parts: What the jobs share.
        address: host:port of this worker, for prefill workers.
        epoch: Lifetime of this process.
    """

    def __init__(self, parts: DecodeParts, address: str, epoch: str) -> None:
        self._parts = parts
        self._address = address
        self._epoch = epoch

    async def Decode(
        self, request: decode_pb2.DecodeRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncGenerator[decode_pb2.DecodeResponse, None]:
        """Stream a reservation, if the prompt is computed elsewhere, and then tokens."""
        job = DecodeJob(self._parts, spec_from_proto(request.sequence))
        match request.mode:
            case decode_pb2.PREFILL_MODE_LOCAL:
                events: AsyncGenerator[Granted | Tokens, None] = job.run_local()
            case decode_pb2.PREFILL_MODE_REMOTE:
                events = job.run_remote()
            case _:
                raise InvalidRequest(f"unknown prefill mode {request.mode}", field="mode")
        async with aclosing(events):
            async for event in events:
                yield self._response(event)

    async def BeginWrite(
        self, request: decode_pb2.BeginWriteRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> decode_pb2.BeginWriteResponse:
        """Count a prefill worker as a writer."""
        reservations = self._parts.reservations
        origin = Origin(address=request.writer_address, epoch=request.writer_epoch)
        if origin.address:
            await reservations.meet(origin)
        is_accepted = reservations.begin_write(request.lease_id, request.epoch, request.writer_id, origin)
        return decode_pb2.BeginWriteResponse(is_accepted=is_accepted)

    async def CommitPrefill(
        self, request: decode_pb2.CommitPrefillRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> decode_pb2.CommitPrefillResponse:
        """Take note of a writer's end, or of its loss."""
        reservations = self._parts.reservations
        if request.epoch != self._epoch:
            return decode_pb2.CommitPrefillResponse(is_accepted=False)
        match request.WhichOneof("outcome"):
            case "first_token":
                first = request.first_token
                token = token_from_proto(first.event)
                reused = Reused(cached_tokens=first.cached_tokens, declined_tokens=first.declined_tokens)
                is_accepted = reservations.commit(request.lease_id, request.writer_id, token, reused)
            case "failure":
                reservations.end_write(request.writer_id, request.lease_id)
                is_accepted = True
            case _:
                is_accepted = reservations.lose(request.lease_id, request.writer_id)
        return decode_pb2.CommitPrefillResponse(is_accepted=is_accepted)

    def _response(self, event: Granted | Tokens) -> decode_pb2.DecodeResponse:
        if isinstance(event, Granted):
            reservation = event.reservation
            lease = block_pb2.BlockLease(
                lease_id=reservation.lease_id,
                epoch=self._epoch,
                deadline_unix_ms=reservation.deadline_unix_ms,
                block_ids=reservation.block_ids,
            )
            target = prefill_pb2.PrefillTarget(address=self._address, lease=lease, cached_tokens=event.cached_tokens)
            return decode_pb2.DecodeResponse(reservation=target)
        response = decode_pb2.DecodeResponse()
        response.tokens.cached_tokens = event.cached_tokens
        response.tokens.declined_tokens = event.declined_tokens
        response.tokens.events.extend(map(token_to_proto, event.tokens))
        return response
