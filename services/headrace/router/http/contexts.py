"""/v1/contexts: prompts whose context still arrives, one request for each change."""

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from headrace.client import messages, values
from headrace.client.context_link import ContextLink
from headrace.core.context import SEQUENCE_FIELD, ContextState
from headrace.core.request import Piece
from headrace.core.tenancy import TENANT_HEADER, tenant_of
from headrace.core.wire import piece_from_proto
from headrace.errors import HeadraceError, InternalError, InvalidRequest, NotReady
from headrace.router.http.bodies import (
    AppendBody,
    CloseBody,
    ContextBody,
    Message,
    OperationBody,
    UpdateBody,
    decode,
    read_body,
    refuse_unsupported,
)
from headrace.router.http.context import HttpContext
from headrace.router.http.context_stream import ContextStream, whole_answer
from headrace.router.http.delivery import EventSender, EventStream, until_disconnect
from headrace.router.http.prompts import chat_messages, timeout_s
from headrace.router.http.request_id import internal_id
from headrace.router.http.sse import encode_json, error_event
from headrace.v1 import ingestor_pb2

CALL_TIMEOUT_S = 30.0
"""Longest time for one change, which waits for others of its context."""

MOST_TIMEOUT_S = 4_000_000.0
"""What the wire carries in milliseconds; the ingestor allows far less."""

LAST_EVENT = "Last-Event-ID"

MOST_CURSOR_DIGITS = 10
"""Ids of events are counts; a header with anything else is of another stream."""

_NAMES = {
    SEQUENCE_FIELD: "sequence",
    "append.text": "text",
    "append.segment_id": "segment",
    "replace.from_segment_id": "from_segment",
    "close.query": "query",
}
"""What bodies call the fields of messages."""

_MODES = {ingestor_pb2.CONTEXT_MODE_APPEND: "append", ingestor_pb2.CONTEXT_MODE_UPDATE: "update"}


async def open_context(request: Request, context: HttpContext) -> Response:
    """Begin a context; it stays between requests until nothing came for it for a while."""
    body = decode(ContextBody, await read_body(request, context.settings))
    refuse_unsupported(body)
    if body.stream is not None or body.stream_options is not None:
        raise InvalidRequest("stream belongs to the close of a context", field="stream")
    if body.n not in (None, 1):
        raise InvalidRequest(f"n must be 1 for a context, found {body.n}", field="n", limit="1")
    if body.messages is not None and body.prefix is not None:
        raise InvalidRequest("give prefix or messages before a context, not both", field="prefix")
    opening = messages.context_request(
        body.prefix or "", _chat(body.messages), body.mode or "append", _options(body, request)
    )
    opening.is_unattended = True
    opening.timeout_ms = _timeout_ms(timeout_s(body, request))
    first = ingestor_pb2.StreamContextRequest(open=opening)
    return await until_disconnect(request.receive, _state(first, None, None, request, context))


async def show_context(request: Request, context: HttpContext) -> Response:
    """Tell how far a context is."""
    return await until_disconnect(request.receive, _state(_resume(request), None, None, request, context))


async def append_to_context(request: Request, context: HttpContext) -> Response:
    """Add text at the end of a context."""
    body = decode(AppendBody, await read_body(request, context.settings))
    operation = ingestor_pb2.ContextOperation()
    operation.append.text = messages.utf8(body.text, "text")
    operation.append.segment_id = body.segment or ""
    return await _operate(operation, body, request, context)


async def update_context(request: Request, context: HttpContext) -> Response:
    """Replace all segments of a context, or one and all behind it."""
    body = decode(UpdateBody, await read_body(request, context.settings))
    operation = ingestor_pb2.ContextOperation()
    segments = messages.segments_of((segment.id, segment.text) for segment in body.segments)
    if body.from_segment is None:
        operation.update.SetInParent()
        operation.update.segments.extend(segments)
    else:
        operation.replace.from_segment_id = body.from_segment
        operation.replace.segments.extend(segments)
    return await _operate(operation, body, request, context)


async def delete_context(request: Request, context: HttpContext) -> Response:
    """Drop a context and its answer."""
    operation = ingestor_pb2.ContextOperation()
    operation.abandon.SetInParent()
    await until_disconnect(request.receive, _state(_resume(request), operation, None, request, context))
    value = {"id": request.path_params["context_id"], "object": "context.deleted", "deleted": True}
    return Response(encode_json(value), media_type="application/json")


async def close_context(request: Request, context: HttpContext) -> Response:
    """End a context and answer it, whole or as a stream.

    The same close may be sent again when its connection broke, with its number, or, for a stream, the id of the last
    event that has arrived: events that have none are part of the next that has one.
    """
    body = decode(CloseBody, await read_body(request, context.settings))
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true", field="stream_options")
    if body.cursor is not None and not body.stream:
        raise InvalidRequest("cursor needs stream to be true", field="cursor")
    if not body.stream:
        return await until_disconnect(request.receive, _whole(body, request, context))
    body = msgspec.structs.replace(body, cursor=_cursor(body.cursor, request))
    wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)

    async def produce(sender: EventSender) -> None:
        async with _closed(body, request, context) as link:
            stream = ContextStream(link.opened, context, has_usage=wants_usage)
            # All of it, for places in the text count from its beginning.
            cursor, number = body.cursor or 0, 0
            async for number, piece in _pieces(link):
                events = stream.events(number, piece)
                if events and number > cursor:
                    await sender.write(events)
            if cursor > number:
                reason = f"the answer has {number} events: there is none behind number {cursor}"
                raise InvalidRequest(reason, field="cursor", limit=f"at most {number}")
            await sender.write(stream.ending())

    return EventStream(produce, error_event)


def _cursor(given: int | None, request: Request) -> int | None:
    """Return the id of the last event that has arrived: as it is given, or as clients of events say it by themselves.

    Raises:
        InvalidRequest: it is none.
    """
    last = request.headers.get(LAST_EVENT)
    if given is None and last is not None and last.isascii() and last.isdigit() and len(last) < MOST_CURSOR_DIGITS:
        return int(last)
    if given is not None and given < 0:
        raise InvalidRequest(f"cursor must be the id of an event, found {given}", field="cursor", limit="at least 0")
    return given


async def _whole(body: CloseBody, request: Request, context: HttpContext) -> Response:
    async with _closed(body, request, context) as link:
        pieces = [piece async for _, piece in _pieces(link)]
        return whole_answer(pieces, link.opened, context)


@asynccontextmanager
async def _closed(body: CloseBody, request: Request, context: HttpContext) -> AsyncIterator[ContextLink]:
    """Close a context; its answer may take as long as the context's own deadline lets it."""
    operation = ingestor_pb2.ContextOperation()
    operation.close.query = body.query or ""
    async with _link(_resume(request), request, context, None) as link:
        if body.cursor is None or body.sequence is not None:
            await _apply(link, operation, body.sequence)
        elif not link.state.is_closed:
            raise InvalidRequest("the context is open: there is no answer to go on with", field="cursor")
        yield link


async def _operate(
    operation: ingestor_pb2.ContextOperation, body: OperationBody, request: Request, context: HttpContext
) -> Response:
    work = _state(_resume(request), operation, body.sequence, request, context)
    return await until_disconnect(request.receive, work)


async def _state(
    first: ingestor_pb2.StreamContextRequest,
    operation: ingestor_pb2.ContextOperation | None,
    sequence: int | None,
    request: Request,
    context: HttpContext,
) -> Response:
    """Open a context or take it up, carry an operation out if there is one, and tell how far it is."""
    async with _link(first, request, context, CALL_TIMEOUT_S) as link:
        if operation is not None:
            await _apply(link, operation, sequence)
        return _shown(link)


async def _apply(link: ContextLink, operation: ingestor_pb2.ContextOperation, sequence: int | None) -> None:
    """Have an operation carried out, as the next one if its number is not given.

    Raises:
        HeadraceError: it was refused, or the context is lost.
    """
    if sequence is not None:
        if not 1 <= sequence < 2**63:
            limit = "1 to 2^63 - 1"
            raise InvalidRequest(f"sequence must be {limit}, found {sequence}", field="sequence", limit=limit)
        operation.sequence = sequence
        refusal = await link.operate(operation)
    else:
        operation.refuse_repeated = True
        refusal = await _apply_next(link, operation)
    if refusal is not None:
        raise refusal


async def _apply_next(link: ContextLink, operation: ingestor_pb2.ContextOperation) -> HeadraceError | None:
    """Try numbers until no other request took this one first."""
    while True:
        operation.sequence = link.state.applied + 1
        refusal = await link.operate(operation)
        if refusal is None or refusal.field != SEQUENCE_FIELD:
            return refusal


async def _pieces(link: ContextLink) -> AsyncIterator[tuple[int, Piece]]:
    """Yield the pieces of the answer, numbered from 1."""
    while True:
        message = await link.piece()
        if message is None:
            raise InternalError("the answer ended without a finish reason")
        piece = piece_from_proto(message.piece)
        yield message.cursor, piece
        if piece.finish is not None:
            return


@asynccontextmanager
async def _link(
    first: ingestor_pb2.StreamContextRequest, request: Request, context: HttpContext, timeout_s: float | None
) -> AsyncIterator[ContextLink]:
    """Call the ingestor of a context, for one request.

    Raises:
        HeadraceError: the call failed, or what was done with it; names the field as it is in the body.
    """
    ingestors = context.ingestors
    if ingestors is None:
        raise NotReady("this router has no ingestor", retry_after_s=1.0)
    tenant = tenant_of(request.headers.getlist(TENANT_HEADER))
    address = ingestors.address_of(first)
    link = ContextLink(address, lambda: ingestors.begin(address, tenant, timeout_s), first)
    try:
        await link.open()
        yield link
    except HeadraceError as error:
        error.field = _NAMES.get(error.field, error.field) if error.field else None
        raise
    finally:
        await link.close()


def _resume(request: Request) -> ingestor_pb2.StreamContextRequest:
    resume = ingestor_pb2.ResumeContext(context_id=request.path_params["context_id"])
    return ingestor_pb2.StreamContextRequest(resume=resume)


def _shown(link: ContextLink) -> Response:
    state, opened = link.state, link.opened
    value = {
        "id": opened.context_id,
        "object": "context",
        "model": opened.model,
        "mode": _MODES.get(opened.mode, "append"),
        "status": "closed" if state.is_closed else "open",
        **_counts(state),
        "max_context_tokens": opened.max_context_tokens,
    }
    return Response(encode_json(value), media_type="application/json")


def _counts(state: ContextState) -> dict[str, int]:
    return {
        "sequence": state.applied,
        "segments": state.num_segments,
        "prompt_tokens": state.num_tokens,
        "computed_tokens": state.num_computed,
    }


def _chat(given: Sequence[Message] | None) -> list[values.Message] | None:
    """Return the messages before a context, of which there may be none."""
    if not given:
        return None if given is None else []
    for index, message in enumerate(given):
        if message.name is not None:
            field = f"messages[{index}].name"
            raise InvalidRequest(f"{field} is not supported before a context", field=field)
    return [values.Message(role=each["role"], content=each["content"]) for each in chat_messages(given)]


def _timeout_ms(timeout_s: float | None) -> int:
    if timeout_s is None:
        return 0
    if not 0 < timeout_s:
        raise InvalidRequest(f"timeout must be above 0, found {timeout_s}", field="timeout", limit="0")
    return math.ceil(min(timeout_s, MOST_TIMEOUT_S) * 1000)


def _options(body: ContextBody, request: Request) -> values.GenerateOptions:
    given = {
        name: getattr(body, name) for name in body.__struct_fields__ if name in values.GenerateOptions.__annotations__
    }
    options = cast(values.GenerateOptions, given)
    options["request_id"] = internal_id(request)
    return options
