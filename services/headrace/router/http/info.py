"""GET endpoints: models, health, readiness, metrics, version."""

from importlib import metadata

from starlette.requests import Request
from starlette.responses import Response

from headrace.errors import NotReady
from headrace.router.frontend import ServedModel
from headrace.router.http.context import HttpContext
from headrace.router.http.sse import encode_json


async def list_models(request: Request, context: HttpContext) -> Response:
    """List the models served; none until a worker has been met."""
    cards = [_card(model, context) for model in context.frontend.models()]
    return _json({"object": "list", "data": cards})


async def show_model(request: Request, context: HttpContext) -> Response:
    """Describe one model.

    Raises:
        UnknownModel: no such model.
        NotReady: no worker has been met yet.
    """
    return _json(_card(context.frontend.model(request.path_params["model_id"]), context))


def _card(model: ServedModel, context: HttpContext) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": context.started_unix_s,
        "owned_by": "headrace",
        "max_model_len": model.max_context_tokens,
    }


async def health(request: Request, context: HttpContext) -> Response:
    """Say that this process answers; says nothing of the cluster behind it."""
    return _json({"status": "ok"})


async def ready(request: Request, context: HttpContext) -> Response:
    """Say whether the cluster can answer now.

    Raises:
        NotReady: with the reason.
    """
    reason = context.frontend.not_ready_reason()
    if reason is not None:
        raise NotReady(reason)
    return _json({"status": "ready"})


async def show_metrics(request: Request, context: HttpContext) -> Response:
    """Return the metrics in Prometheus' text form."""
    return Response(context.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def version(request: Request, context: HttpContext) -> Response:
    """Return the version of headrace."""
    try:
        found = metadata.version("headrace")
    except metadata.PackageNotFoundError:
        found = "not installed"
    return _json({"version": found})


def _json(value: object) -> Response:
    return Response(encode_json(value), media_type="application/json")
