"""A scripted router that notes how contexts arrive."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing

from headrace.core.request import ContextProgress, GenerationRequest, Piece, Revision
from headrace.errors import HeadraceError
from headrace.router.frontend import ServedModel
from headrace.testing.frontend import Script, ScriptedFrontend

PATIENCE_S = 5.0


class Arrival:
    """A context as the router saw it.

    Attributes:
        request: That opened it.
        versions: Tokens of each version.
        kept: Leading tokens that each of them but the first kept.
        finals: Leading tokens that were said to stay, of each version that did not close it.
        has_ended: Whether its call is over.
    """

    def __init__(self, request: GenerationRequest, num_final: int) -> None:
        self.request = request
        self.versions = [request.prompt]
        self.kept: list[int] = []
        self.finals = [num_final]
        self.has_ended = False

    def take(self, revision: Revision) -> None:
        """Take note of the next version."""
        assert revision.num_kept >= self.finals[-1], "a promise is broken"
        self.kept.append(revision.num_kept)
        self.versions.append((*self.versions[-1][: revision.num_kept], *revision.tokens))
        if not revision.is_closed:
            self.finals.append(revision.num_final)


class WatchedFrontend(ScriptedFrontend):
    """Plays a script, and notes how the contexts for it arrive; tells of progress of every version, as routers do.

    Attributes:
        contexts: All that were opened.
        refusals: What the next ones are refused with, one each.
        is_computing: Whether it tells of progress.
    """

    def __init__(self, models: Iterable[ServedModel], script: Script) -> None:
        super().__init__(models, script)
        self.contexts: list[Arrival] = []
        self.refusals: list[HeadraceError] = []
        self.is_computing = True

    async def seen(self, is_so: Callable[[list[Arrival]], object]) -> None:
        """Wait until something is so of the contexts."""
        async with asyncio.timeout(PATIENCE_S):
            while not is_so(self.contexts):
                await self._changed.wait()

    async def submit_context(
        self, request: GenerationRequest, num_final: int, revisions: AsyncIterator[Revision]
    ) -> AsyncGenerator[Piece | ContextProgress, None]:
        """Take all revisions, tell of progress of each version, then play the script."""
        if self.refusals:
            raise self.refusals.pop(0)
        arrival, num_tokens = Arrival(request, num_final), len(request.prompt)
        self.contexts.append(arrival)
        self._notify()
        try:
            if self.is_computing:
                yield ContextProgress(version=0, num_computed=max(0, num_tokens - 1), num_tokens=num_tokens)
            watched = self._watched(arrival, revisions)
            async with aclosing(super().submit_context(request, num_final, watched)) as events:
                async for event in events:
                    if self.is_computing or isinstance(event, Piece):
                        yield event
        finally:
            arrival.has_ended = True
            self._notify()

    async def _watched(self, arrival: Arrival, revisions: AsyncIterator[Revision]) -> AsyncIterator[Revision]:
        async for revision in revisions:
            arrival.take(revision)
            self._notify()
            yield revision
