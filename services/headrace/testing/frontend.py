"""A frontend that plays a script instead of serving a model."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import TypeAlias

from headrace.core.request import (
    ContextProgress,
    FinishReason,
    GenerationRequest,
    Piece,
    RequestId,
    Revision,
    Token,
    Usage,
)
from headrace.errors import HeadraceError, NotReady, UnknownModel
from headrace.router.frontend import ServedModel

Step: TypeAlias = Piece | HeadraceError | asyncio.Event
"""A piece is handed out, an error is raised, an event is waited for."""
Script: TypeAlias = Callable[[GenerationRequest], Iterable[Step]]


class ScriptedFrontend:
    """Implements `Frontend` by playing the same script for every request.

    Attributes:
        requests: Everything submitted, in order.
        ended: Requests whose iterator has ended, whatever the reason.
        reason: Why it is not ready; None when it is.

    Args:
        models: Models served.
        script: Steps for a request.
    """

    def __init__(self, models: Iterable[ServedModel], script: Script) -> None:
        self._models = tuple(models)
        self.script = script
        self.requests: list[GenerationRequest] = []
        self.ended: list[RequestId] = []
        self.reason: str | None = None
        self._changed = asyncio.Event()

    async def until(self, *, submitted: int = 0, ended: int = 0) -> None:
        """Wait until at least so many requests were submitted and have ended.

        Bound it with a timeout; it has none of its own.
        """
        while len(self.requests) < submitted or len(self.ended) < ended:
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def models(self) -> tuple[ServedModel, ...]:
        """Return the models given."""
        return self._models

    def model(self, name: str | None) -> ServedModel:
        """Return a model by name; None is the first.

        Raises:
            UnknownModel: no such model.
            NotReady: no models were given.
        """
        if not self._models:
            raise NotReady("no worker yet")
        for model in self._models:
            if name in (None, model.name):
                return model
        raise UnknownModel(f"model {name!r} is not served here", field="model")

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """Play the script; an error step is raised."""
        self.requests.append(request)
        self._notify()
        try:
            for step in self.script(request):
                if isinstance(step, HeadraceError):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
        finally:
            self.ended.append(request.request_id)
            self._notify()

    async def submit_context(
        self, request: GenerationRequest, num_final: int, revisions: AsyncIterator[Revision]
    ) -> AsyncGenerator[Piece | ContextProgress, None]:
        """Take all revisions, tell of progress after each, then play the script."""
        tokens = list(request.prompt)
        async for revision in revisions:
            tokens[revision.num_kept :] = revision.tokens
            if revision.is_closed:
                break
            num_computed = max(0, len(tokens) - 1)
            yield ContextProgress(version=revision.version, num_computed=num_computed, num_tokens=len(tokens))
        async with aclosing(self.submit(dataclasses.replace(request, prompt=tuple(tokens)))) as pieces:
            async for piece in pieces:
                yield piece

    def not_ready_reason(self) -> str | None:
        """Return `reason`."""
        return self.reason


def say(*texts: str, finish: FinishReason = FinishReason.STOP, cached_tokens: int = 0) -> Script:
    """Return a script in which every choice says the same texts, one token each.

    Token ids are 3, 4, ... in order; log-probabilities, where asked for, fall by a half each.

    Args:
        texts: At least one.
        finish: Reason of the last piece.
        cached_tokens: Reported with the usage.
    """

    def script(request: GenerationRequest) -> Iterable[Step]:
        for cursor, text in enumerate(texts):
            is_last = cursor == len(texts) - 1
            for choice in range(request.num_choices):
                reason = finish if is_last else None
                yield Piece(
                    choice=choice,
                    text=text,
                    tokens=(_token(cursor, reason, request.sampling.logprobs),),
                    finish=reason,
                    usage=_usage(request, len(texts), cached_tokens) if reason and _is_last(choice, request) else None,
                )

    return script


def _is_last(choice: int, request: GenerationRequest) -> bool:
    return choice == request.num_choices - 1


def _usage(request: GenerationRequest, num_tokens: int, cached_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=len(request.prompt),
        completion_tokens=num_tokens * request.num_choices,
        cached_tokens=cached_tokens,
    )


def _token(cursor: int, finish: FinishReason | None, num_logprobs: int | None) -> Token:
    if num_logprobs is None:
        return Token(cursor=cursor, token_id=3 + cursor, finish=finish)
    logprob = -0.5 * (cursor + 1)
    best = tuple((3 + cursor + rank, logprob - rank) for rank in range(num_logprobs))
    return Token(cursor=cursor, token_id=3 + cursor, logprob=logprob, top_logprobs=best, finish=finish)
