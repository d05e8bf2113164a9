"""DecodeService on the wire: translates and decides nothing."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import grpc.aio

from headrace.core.request import Revision
from headrace.core.wire import revision_from_proto, spec_from_proto, token_from_proto, token_to_proto
from headrace.decode.context_job import Computed, DecodeContextJob
from headrace.decode.job import DecodeJob, DecodeParts, Granted, Tokens
from headrace.decode.reservations import Origin, Reused
from headrace.errors import InvalidRequest
from headrace.v1 import block_pb2, decode_pb2, decode_pb2_grpc, generate_pb2, prefill_pb2
from headrace.worker.context import not_opened

logger = logging.getLogger(__name__)


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

    async def DecodeContext(
        self,
        request_iterator: AsyncIterator[decode_pb2.DecodeContextRequest],
        context: grpc.aio.ServicerContext[object, object],
    ) -> AsyncGenerator[decode_pb2.DecodeContextResponse, None]:
        """Stream reservations, or how far the prompt is computed, and then tokens."""
        opening = await anext(request_iterator, None)
        if opening is None or not opening.HasField("open"):
            raise not_opened()
        spec = spec_from_proto(opening.open.sequence)
        job = DecodeContextJob(self._parts, spec, opening.final_tokens, _revisions(request_iterator))
        match opening.open.mode:
            case decode_pb2.PREFILL_MODE_LOCAL:
                events: AsyncGenerator[Granted | Computed | Tokens, None] = job.run_local()
            case decode_pb2.PREFILL_MODE_REMOTE:
                events = job.run_remote()
            case _:
                raise InvalidRequest(f"unknown prefill mode {opening.open.mode}", field="mode")
        async with aclosing(events):
            async for event in events:
                match event:
                    case Granted():
                        yield decode_pb2.DecodeContextResponse(reservation=self._target(event))
                    case Computed(version=version, num_tokens=num_tokens):
                        progress = generate_pb2.ContextProgress(version=version, computed_tokens=num_tokens)
                        yield decode_pb2.DecodeContextResponse(progress=progress)
                    case Tokens():
                        yield decode_pb2.DecodeContextResponse(tokens=_token_events(event))

    async def BeginWrite(
        self, request: decode_pb2.BeginWriteRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> decode_pb2.BeginWriteResponse:
        """Count a prefill worker as a writer, unless its end could not be proven later."""
        reservations = self._parts.reservations
        origin = Origin(address=request.writer_address, epoch=request.writer_epoch)
        is_known = not origin.address or await reservations.meet(origin)
        if not is_known:
            logger.warning("writer refused: it does not answer at its address", extra={"address": origin.address})
        is_accepted = is_known and reservations.begin_write(request.lease_id, request.epoch, request.writer_id, origin)
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
            return decode_pb2.DecodeResponse(reservation=self._target(event))
        return decode_pb2.DecodeResponse(tokens=_token_events(event))

    def _target(self, granted: Granted) -> prefill_pb2.PrefillTarget:
        reservation = granted.reservation
        lease = block_pb2.BlockLease(
            lease_id=reservation.lease_id,
            epoch=self._epoch,
            deadline_unix_ms=reservation.deadline_unix_ms,
            block_ids=reservation.block_ids,
        )
        return prefill_pb2.PrefillTarget(
            address=self._address, lease=lease, cached_tokens=granted.cached_tokens, version=reservation.version
        )


def _token_events(tokens: Tokens) -> decode_pb2.TokenEvents:
    events = decode_pb2.TokenEvents(cached_tokens=tokens.cached_tokens, declined_tokens=tokens.declined_tokens)
    events.events.extend(map(token_to_proto, tokens.tokens))
    return events


async def _revisions(requests: AsyncIterator[decode_pb2.DecodeContextRequest]) -> AsyncIterator[Revision]:
    async for request in requests:
        if not request.HasField("revision"):
            raise not_opened()
        yield revision_from_proto(request.revision)
