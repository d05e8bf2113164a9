"""Errors as OpenAI clients know them."""

import logging
import math
from collections.abc import Mapping

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from headrace.errors import Cancelled, HeadraceError, InvalidRequest, NotReady, Saturated

_LOG = logging.getLogger(__name__)
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}


class BodyTooLarge(InvalidRequest):
    """The request body is over the limit; send less."""

    code = "request_too_large"
    http_status = 413


class BodyTimeout(InvalidRequest):
    """The request body took too long to arrive; send it again."""

    code = "request_timeout"
    http_status = 408


class UnsupportedMedia(InvalidRequest):
    """The request body is not declared as JSON."""

    code = "unsupported_media_type"
    http_status = 415


def error_body(error: HeadraceError) -> dict[str, object]:
    """Return the JSON value of an error."""
    return _body(error.message, error.http_status, error.field, error.code)


def error_response(error: HeadraceError) -> Response:
    """Return the whole answer of a failed request, with Retry-After where a retry helps."""
    return _response(error.http_status, error_body(error), _retry_headers(error))


def head_too_large(limit: int) -> bytes:
    """Return the whole answer, as bytes, to a request of which not even the head could be read."""
    body = msgspec.json.encode(_body(f"the request's head is larger than {limit} bytes", 431, None, "head_too_large"))
    return (
        b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n" % len(body)
    ) + body


def _retry_headers(error: HeadraceError) -> Mapping[str, str]:
    wait_s = error.retry_after_s
    if wait_s is None and isinstance(error, Saturated | NotReady):
        wait_s = 1.0
    return {} if wait_s is None else {"retry-after": str(max(1, math.ceil(wait_s)))}


def _body(message: str, status: int, param: str | None, code: str | None) -> dict[str, object]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _response(status: int, body: object, headers: Mapping[str, str]) -> Response:
    return Response(msgspec.json.encode(body), status, dict(headers), "application/json")


async def _on_headrace_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HeadraceError):
        raise error
    if error.http_status >= 500:
        _LOG.warning("request failed", extra={"path": _shown_path(request), "code": error.code})
    return error_response(error)


def _shown_path(request: Request) -> str:
    """Return the path without what it names: whoever knows the id of a context has it."""
    path = request.url.path
    for name, value in request.path_params.items():
        path = path.replace(str(value), f"{{{name}}}")
    return path


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    status = error.status_code
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _response(status, _body(message, status, None, _CODES.get(status)), error.headers or {})


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return error_response(Cancelled("the client left"))


async def _on_bug(request: Request, error: Exception) -> Response:
    # The server logs the exception itself; its text may hold a prompt, so the client gets none of it.
    return _response(500, _body("internal error", 500, None, "internal"), {})


def install_error_handlers(app: FastAPI) -> None:
    """Make every failure of the application answer with an OpenAI error body."""
    app.add_exception_handler(HeadraceError, _on_headrace_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)
    app.add_exception_handler(Exception, _on_bug)
