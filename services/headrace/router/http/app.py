"""The HTTP application."""

import secrets
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from headrace.clock import Clock
from headrace.router.frontend import Frontend
from headrace.router.http import contexts, info
from headrace.router.http.chat import chat_completions
from headrace.router.http.completions import completions
from headrace.router.http.context import HttpContext, HttpSettings
from headrace.router.http.errors import install_error_handlers
from headrace.router.http.request_id import RequestIdMiddleware
from headrace.router.http.tokens import detokenize, tokenize
from headrace.router.ingestors import Ingestors

Endpoint: TypeAlias = Callable[[Request, HttpContext], Awaitable[Response]]

_ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("GET", "/v1/models", info.list_models),
    ("GET", "/v1/models/{model_id:path}", info.show_model),
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/contexts", contexts.open_context),
    ("GET", "/v1/contexts/{context_id}", contexts.show_context),
    ("DELETE", "/v1/contexts/{context_id}", contexts.delete_context),
    ("POST", "/v1/contexts/{context_id}/append", contexts.append_to_context),
    ("POST", "/v1/contexts/{context_id}/update", contexts.update_context),
    ("POST", "/v1/contexts/{context_id}/close", contexts.close_context),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("GET", "/health", info.health),
    ("GET", "/ready", info.ready),
    ("GET", "/metrics", info.show_metrics),
    ("GET", "/version", info.version),
)


def _fresh_bits() -> int:
    return secrets.randbits(64)


def create_app(
    frontend: Frontend,
    *,
    clock: Clock,
    metrics: Callable[[], bytes],
    settings: HttpSettings,
    entropy: Callable[[], int] = _fresh_bits,
    ingestors: Ingestors | None = None,
) -> FastAPI:
    """Return the application; it holds no state of its own beyond live requests.

    Args:
        frontend: What generates.
        clock: For deadlines and timestamps.
        metrics: Returns the Prometheus text.
        settings: Bounds.
        entropy: Returns 64 random bits, for seeds and ids.
        ingestors: Keep contexts that still arrive.
    """
    context = HttpContext(
        frontend=frontend,
        clock=clock,
        metrics=metrics,
        settings=settings,
        entropy=entropy,
        started_unix_s=clock.unix_ms() // 1000,
        ingestors=ingestors,
    )
    # The interactive pages of FastAPI load scripts from other hosts, and bodies are msgspec types
    # that its schema would not show.
    app = FastAPI(title="headrace", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    for method, path, endpoint in _ROUTES:
        app.router.add_route(path, _bind(endpoint, context), methods=[method])
    install_error_handlers(app)
    app.add_middleware(RequestIdMiddleware, entropy=entropy)
    return app


def _bind(endpoint: Endpoint, context: HttpContext) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        return await endpoint(request, context)

    return handle
