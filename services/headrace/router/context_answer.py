"""A context and its answer, as a front door shows them."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from headrace.core.request import ContextProgress, Piece, Revision, Usage
from headrace.errors import Cancelled, HeadraceError, InternalError, InvalidRequest
from headrace.router.answer import ChoiceText
from headrace.router.context import ContextRun
from headrace.runtime.telemetry import RequestMeter, RouterMetrics

logger = logging.getLogger(__name__)


class ContextAnswer:
    """Feeds a context and turns the tokens of its answer into text.

    The clock of its first token runs from the close: what is measured is what is waited for.

    Args:
        run: Carries it through the workers.
        text: Of the answer.
        tasks: Outlives every request.
        metrics: Where to count.
    """

    def __init__(self, run: ContextRun, text: ChoiceText, tasks: asyncio.TaskGroup, metrics: RouterMetrics) -> None:
        self._run = run
        self._text = text
        self._tasks = tasks
        self._metrics = metrics
        self._meter: RequestMeter | None = None
        self._arrived: asyncio.Queue[Piece | ContextProgress | HeadraceError] = asyncio.Queue()

    async def events(self, revisions: AsyncIterator[Revision]) -> AsyncGenerator[Piece | ContextProgress, None]:
        """Yield progress and pieces until the answer ends; the last piece carries the usage.

        Raises:
            HeadraceError: the context, or its answer, failed.
        """
        outcome = Cancelled.code
        work = (self._feed(revisions), self._pump())
        tasks = [self._tasks.create_task(each) for each in work]
        try:
            while True:
                event = await self._arrived.get()
                if isinstance(event, HeadraceError):
                    outcome = event.code
                    raise event
                if isinstance(event, Piece) and self._meter is not None:
                    self._meter.piece(event)
                yield event
                if isinstance(event, Piece) and event.finish is not None:
                    outcome = "ok"
                    return
        finally:
            for task in tasks:
                task.cancel()
            # Who closes this may count on it: nothing of the request runs in the router any more.
            await asyncio.wait(tasks)
            if self._meter is not None:
                self._meter.end(outcome)

    async def _feed(self, revisions: AsyncIterator[Revision]) -> None:
        is_closed = False
        try:
            async for each in revisions:
                await self._run.room()
                self._run.revise(each.num_kept, each.tokens, num_final=each.num_final, is_closed=each.is_closed)
                if each.is_closed:
                    is_closed, self._meter = True, self._metrics.begin()
            if not is_closed:
                raise InvalidRequest("the context ended before it was closed", field="revision.is_closed")
        except HeadraceError as error:
            self._arrived.put_nowait(error)
        except Exception as error:  # noqa: BLE001 what gRPC raises when a call ends under its reader is not public
            logger.info("context broke off", extra={"error": repr(error)})
            self._arrived.put_nowait(Cancelled("the stream of the context broke off"))

    async def _pump(self) -> None:
        num_tokens = cached_tokens = 0
        try:
            async with aclosing(self._run.events()) as events:
                async for event in events:
                    if isinstance(event, ContextProgress):
                        self._arrived.put_nowait(event)
                        continue
                    piece = self._text.push(event.tokens)
                    num_tokens += len(piece.tokens)
                    cached_tokens = max(cached_tokens, event.cached_tokens)
                    if piece.finish is None:
                        self._arrived.put_nowait(piece)
                        continue
                    usage = Usage(
                        prompt_tokens=self._run.num_tokens, completion_tokens=num_tokens, cached_tokens=cached_tokens
                    )
                    self._arrived.put_nowait(
                        Piece(choice=0, text=piece.text, tokens=piece.tokens, finish=piece.finish, usage=usage)
                    )
                    return
        except HeadraceError as error:
            self._arrived.put_nowait(error)
        except Exception:  # noqa: BLE001 a bug in one request must not take the router's other requests along
            logger.exception("context failed")
            self._arrived.put_nowait(InternalError("the router failed on this context; its log has the cause"))
