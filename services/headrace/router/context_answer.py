"""A context and its answer, as a front door shows them."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from headrace.core.request import ContextProgress, Piece, Revision, Usage
from headrace.errors import Cancelled, DeadlineExceeded, HeadraceError, InternalError, InvalidRequest
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
        idle_s: When a context that is computed as far as it is known, and of which nothing comes, is given up.
    """

    def __init__(
        self, run: ContextRun, text: ChoiceText, tasks: asyncio.TaskGroup, metrics: RouterMetrics, idle_s: float
    ) -> None:
        self._run = run
        self._text = text
        self._tasks = tasks
        self._metrics = metrics
        self._idle_s = idle_s
        self._heard_s = asyncio.get_running_loop().time()
        self._progress = ContextProgress(version=0, num_computed=0, num_tokens=0)
        self._meter: RequestMeter | None = None
        self._arrived: asyncio.Queue[Piece | HeadraceError | None] = asyncio.Queue()
        self._has_progress = False

    async def events(self, revisions: AsyncIterator[Revision]) -> AsyncGenerator[Piece | ContextProgress, None]:
        """Yield progress and pieces until the answer ends; the last piece carries the usage.

        Raises:
            HeadraceError: the context, or its answer, failed.
        """
        outcome = Cancelled.code
        work = (self._feed(revisions), self._pump(), self._expire())
        tasks = [self._tasks.create_task(each) for each in work]
        try:
            while True:
                event = await self._arrived.get()
                if event is None:
                    self._has_progress = False
                    yield self._progress
                    continue
                if isinstance(event, HeadraceError):
                    outcome = event.code
                    raise event
                if self._meter is not None:
                    self._meter.piece(event)
                yield event
                if event.finish is not None:
                    outcome = "ok"
                    return
        finally:
            for task in tasks:
                task.cancel()
            # Who closes this may count on it: nothing of the request runs in the router any more.
            await asyncio.wait(tasks)
            if self._meter is not None:
                self._meter.end(outcome)

    def _show(self, progress: ContextProgress) -> None:
        """Take in progress; of what nobody has read yet, the last counts."""
        self._progress = progress
        if not self._has_progress:
            self._has_progress = True
            self._arrived.put_nowait(None)

    async def _expire(self) -> None:
        """Give up a context whose feeder has nothing to wait for and says nothing."""
        loop = asyncio.get_running_loop()
        while self._meter is None:
            quiet_s = loop.time() - self._heard_s
            progress, num_tokens = self._progress, self._run.num_tokens
            # The last known token is not computed before the close; of a single one nobody tells anything.
            is_computed = num_tokens <= 1 or (
                progress.num_tokens == num_tokens and progress.num_computed >= num_tokens - 1
            )
            if quiet_s >= self._idle_s and is_computed:
                reason = f"nothing came for the context for {self._idle_s:g} s"
                self._arrived.put_nowait(DeadlineExceeded(reason, field="revision", limit=f"{self._idle_s:g} s"))
                return
            await asyncio.sleep(max(self._idle_s - quiet_s, self._idle_s / 8))

    async def _feed(self, revisions: AsyncIterator[Revision]) -> None:
        is_closed = False
        try:
            async for each in revisions:
                await self._run.room()
                self._heard_s = asyncio.get_running_loop().time()
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
                        self._show(event)
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
