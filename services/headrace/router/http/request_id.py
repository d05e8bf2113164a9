"""The name of a request: the client's, made unique."""

import re
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.errors import InvalidRequest
from headrace.router.http.errors import error_response

HEADER = "X-Request-Id"
# Shorter than core.validate allows: the unique ending is added, and a number per prompt.
_ALLOWED = re.compile(r"[A-Za-z0-9._:/+=@-]{1,96}")


class RequestIdMiddleware:
    """Gives every HTTP request an id and echoes it; clients may send their own.

    Clients may use one id twice at the same time, but workers need unique ones: the
    internal id is the client's with a random ending.

    Args:
        app: The application.
        entropy: Returns 64 random bits.
    """

    def __init__(self, app: ASGIApp, entropy: Callable[[], int]) -> None:
        self._app = app
        self._entropy = entropy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER)
        if given is not None and _ALLOWED.fullmatch(given) is None:
            limit = "1 to 96 characters of A-Z a-z 0-9 . _ : / + = @ -"
            await error_response(InvalidRequest(f"{HEADER} must be {limit}", field=HEADER, limit=limit))(
                scope, receive, send
            )
            return
        ending = f"{self._entropy():016x}"
        internal = ending if given is None else f"{given}-{ending[-8:]}"
        scope.setdefault("state", {})["request_id"] = internal
        shown = given or internal

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                MutableHeaders(scope=message)[HEADER] = shown
            await send(message)

        await self._app(scope, receive, send_named)


def internal_id(request: Request) -> str:
    """Return the unique id of a request."""
    return str(request.state.request_id)
