"""What happens around every gRPC handler: errors become statuses, work is counted, draining refuses."""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio

from headrace.core.status import DETAILS_KEY, status_of
from headrace.errors import Draining, HeadraceError, InternalError

logger = logging.getLogger(__name__)

DRAIN_RETRY_S = 1.0

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # a string: the class is generic in the stubs only
_KINDS: dict[tuple[bool, bool], tuple[str, Callable[..., _Handler]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}
"""Where a handler keeps its function, by whether requests and responses are streams."""


class CallGate:
    """Counts calls that bring work, and refuses them while draining.

    Args:
        new_work: Full names of the methods that bring work.
    """

    def __init__(self, new_work: frozenset[str]) -> None:
        self.is_draining = False
        self.num_running = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._new_work = new_work
        self._calls: set[asyncio.Task[Any]] = set()
        self._given_up: set[asyncio.Task[Any]] = set()

    @contextmanager
    def enter(self, method: str) -> Iterator[None]:
        """Hold while a call runs.

        Raises:
            Draining: the call would bring work.
        """
        if method not in self._new_work:
            yield
            return
        if self.is_draining:
            raise Draining("this process is leaving: ask another", retry_after_s=DRAIN_RETRY_S)
        call = asyncio.current_task()
        if call is None:
            raise InternalError("a call runs in no task")
        self._calls.add(call)
        self.num_running += 1
        self.idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            # A client that cancelled at the same time hears nothing any more.
            if call not in self._given_up or call.uncancel():
                raise
            raise Draining("this process has left before the call was done: ask another") from None
        finally:
            self._calls.discard(call)
            self._given_up.discard(call)
            self.num_running -= 1
            if not self.num_running:
                self.idle.set()

    def give_up(self) -> None:
        """End the running calls that brought work: each raises Draining to its caller."""
        for call in self._calls - self._given_up:
            self._given_up.add(call)
            call.cancel()


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """The one place where HeadraceErrors become gRPC statuses.

    Args:
        name: Name of this process, put into errors it raises.
        gate: Counts and refuses calls.
    """

    def __init__(self, name: str, gate: CallGate) -> None:
        self._name = name
        self._gate = gate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "Awaitable[_Handler | None]"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        kind = (handler.request_streaming, handler.response_streaming)
        attribute, make = _KINDS[kind]
        inner = getattr(handler, attribute)
        behaviour = self._streaming(method, inner) if handler.response_streaming else self._unary(method, inner)
        return make(behaviour, handler.request_deserializer, handler.response_serializer)

    def _unary(self, method: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: ANN401 any message
            async with self._guard(method, context):
                return await inner(request, context)

        return handle

    def _streaming(self, method: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # noqa: ANN401 any message
            async with self._guard(method, context):
                if not inspect.isasyncgenfunction(inner):
                    await inner(request, context)
                    return
                # Written here rather than yielded to gRPC, which leaves a cancelled generator to the garbage
                # collector: its `finally` blocks, which free KV blocks, must run before the call is over.
                async with aclosing(inner(request, context)) as responses:
                    async for response in responses:
                        await context.write(response)

        return handle

    @asynccontextmanager
    async def _guard(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
        try:
            with self._gate.enter(method):
                yield
        except grpc.aio.AbortError:
            raise
        except HeadraceError as error:
            if isinstance(error, InternalError):
                logger.exception("call failed", extra={"method": method})
            await self._abort(context, error)
        except Exception:  # noqa: BLE001 the last handler before the wire: a bug must not show its insides to clients
            logger.exception("call raised an unexpected exception", extra={"method": method})
            await self._abort(context, InternalError(f"{method} failed by a bug; the log of {self._name} has more"))

    async def _abort(self, context: grpc.aio.ServicerContext[Any, Any], error: HeadraceError) -> NoReturn:
        status = status_of(error, self._name)
        metadata = ((DETAILS_KEY, status.SerializeToString()),)
        await context.abort(grpc.StatusCode[error.grpc_status], status.message, metadata)
