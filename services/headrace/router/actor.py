"""Live requests: admitted or refused, fanned out, merged, ended."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from headrace.clock import Clock
from headrace.core.request import (
    ContextProgress,
    GenerationRequest,
    Piece,
    Revision,
    SamplingParams,
    SequenceId,
    SequenceSpec,
    Usage,
)
from headrace.errors import (
    DeadlineExceeded,
    Draining,
    HeadraceError,
    InternalError,
    NotReady,
    Overloaded,
    Saturated,
    UnknownModel,
)
from headrace.router.answer import ChoiceText
from headrace.router.config import RouterConfig
from headrace.router.context import ContextRun
from headrace.router.context_answer import ContextAnswer
from headrace.router.frontend import ServedModel
from headrace.router.policy import retry_after_s
from headrace.router.sequence import SequenceParts, SequenceRun
from headrace.runtime.telemetry import RouterMetrics
from headrace.text.model import TextModel
from headrace.v1 import cluster_pb2

logger = logging.getLogger(__name__)

CANARY_TIMEOUT_S = 10.0
CANARY_RETRY_S = 0.1
LOOK_S = 0.25
MEAN_WEIGHT = 0.1
_FIRST_MEAN_REQUEST_S = 2.0


class LiveRequests:
    """Owner of all live requests of a router; implements `Frontend`.

    Args:
        config: Bounds.
        parts: What the sequences share.
        text: Tokenizer and template of the model.
        metrics: Where to count.
    """

    def __init__(
        self, config: RouterConfig, parts: SequenceParts, text: TextModel, clock: Clock, metrics: RouterMetrics
    ) -> None:
        self._config = config
        self._parts = parts
        self._text = text
        self._clock = clock
        self._metrics = metrics
        self._served: ServedModel | None = None
        self._block_tokens = 0
        self._num_live = 0
        self._contexts: Counter[str] = Counter()
        self._mean_request_s = _FIRST_MEAN_REQUEST_S
        self._last_token_s: float | None = None
        self._started_members: set[str] = set()
        self._not_ready: str | None = "starting: no worker has been met"
        self.is_draining = False

    @property
    def num_live(self) -> int:
        """Requests admitted and not ended."""
        return self._num_live

    def meet(self, peer: cluster_pb2.HandshakeResponse) -> None:
        """Learn the served model from a worker's handshake."""
        if not peer.model_fingerprint:
            return
        self._served = ServedModel(
            name=self._config.model_name or peer.model,
            max_context_tokens=peer.max_context_tokens,
            fingerprint=peer.model_fingerprint,
            text=self._text,
        )
        self._block_tokens = peer.layout.block_tokens

    def models(self) -> tuple[ServedModel, ...]:
        """Return the models served; empty until a worker has been met."""
        return (self._served,) if self._served is not None else ()

    def model(self, name: str | None) -> ServedModel:
        """Return a model by name; None is the only one served."""
        if self._served is None:
            raise NotReady("no worker has been met yet: retry shortly", retry_after_s=1.0)
        if name not in (None, "", self._served.name):
            raise UnknownModel(f"model {name!r} is not served here; served is {self._served.name!r}", field="model")
        return self._served

    def not_ready_reason(self) -> str | None:
        """Return why the cluster cannot answer now, or None when it can."""
        if self.is_draining:
            return "draining"
        if self._not_ready is None and not self._parts.table.usable():
            return "no worker is connected and ready"
        return self._not_ready

    async def submit_context(
        self, request: GenerationRequest, num_final: int, revisions: AsyncIterator[Revision]
    ) -> AsyncGenerator[Piece | ContextProgress, None]:
        """Generate from a prompt that still arrives; closing the generator stops all work of the request."""
        model = self.model(request.model)
        self._admit_context(request.tenant)
        run = ContextRun(self._parts, _spec(request, model, 0), model.fingerprint, self._block_tokens, num_final)
        text, idle_s = ChoiceText(0, model.text, request.stop), self._config.context_idle_s
        answer = ContextAnswer(run, text, self._parts.tasks, self._metrics, idle_s)
        try:
            async with aclosing(answer.events(revisions)) as events:
                async for event in events:
                    if isinstance(event, Piece):
                        self._last_token_s = self._clock.now()
                    yield event
        finally:
            self._contexts -= Counter({request.tenant: 1})

    def _admit_context(self, tenant: str) -> None:
        limit, num_contexts, num_own = self._config.max_contexts, self._contexts.total(), self._contexts[tenant]
        if self.is_draining:
            self._metrics.refuse(Draining.code)
            raise Draining("this router is leaving: retry elsewhere", retry_after_s=1.0)
        if num_contexts >= limit:
            self._metrics.refuse(Saturated.code)
            raise Saturated(f"{num_contexts} contexts are open", limit=str(limit), retry_after_s=1.0)
        if num_own >= (limit := self._config.max_tenant_contexts):
            self._metrics.refuse(Overloaded.code)
            raise Overloaded(
                f"{num_own} contexts of this tenant are open", field="x-tenant-id", limit=str(limit), retry_after_s=1.0
            )
        self._contexts[tenant] += 1

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """Generate; closing the generator stops all work of the request."""
        self._admit()
        meter = self._metrics.begin()
        begun_s = self._clock.now()
        outcome = "cancelled"
        try:
            async with aclosing(self._merge(request)) as pieces:
                async for piece in pieces:
                    self._last_token_s = self._clock.now()
                    meter.piece(piece)
                    yield piece
            outcome = "ok"
        except HeadraceError as error:
            outcome = error.code
            raise
        finally:
            self._num_live -= 1
            duration_s = self._clock.now() - begun_s
            self._mean_request_s += MEAN_WEIGHT * (duration_s - self._mean_request_s)
            meter.end(outcome)

    def _admit(self) -> None:
        limit = self._config.max_live_requests
        if self.is_draining:
            self._metrics.refuse(Draining.code)
            raise Draining("this router is leaving: retry elsewhere", retry_after_s=1.0)
        if self._num_live >= limit:
            self._metrics.refuse(Saturated.code)
            wait_s = retry_after_s(self._num_live, limit, self._mean_request_s)
            raise Saturated(f"{self._num_live} requests are live", limit=str(limit), retry_after_s=wait_s)
        self._num_live += 1

    async def _merge(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """Run all choices and yield their pieces as they come; the last one carries the usage."""
        arrived: asyncio.Queue[tuple[Piece, int] | HeadraceError] = asyncio.Queue()
        choices = [
            self._parts.tasks.create_task(self._run_choice(request, choice, arrived))
            for choice in range(request.num_choices)
        ]
        num_open, num_tokens, cached_tokens = request.num_choices, 0, 0
        try:
            while num_open:
                item = await arrived.get()
                if isinstance(item, HeadraceError):
                    raise item
                piece, cached = item
                num_tokens += len(piece.tokens)
                cached_tokens = max(cached_tokens, cached)
                num_open -= piece.finish is not None
                yield piece if num_open else _with_usage(piece, len(request.prompt), num_tokens, cached_tokens)
        finally:
            for task in choices:
                task.cancel()
            # Who closes this may count on it: nothing of the request runs in the router any more.
            await asyncio.wait(choices)

    async def _run_choice(
        self, request: GenerationRequest, choice: int, arrived: "asyncio.Queue[tuple[Piece, int] | HeadraceError]"
    ) -> None:
        try:
            await self._pump(request, choice, arrived)
        except HeadraceError as error:
            arrived.put_nowait(error)
        except Exception:  # noqa: BLE001 a bug in one request must not take the router's other requests along
            logger.exception("request failed", extra={"request_id": request.request_id})
            arrived.put_nowait(InternalError("the router failed on this request; its log has the cause"))

    async def _pump(
        self, request: GenerationRequest, choice: int, arrived: "asyncio.Queue[tuple[Piece, int] | HeadraceError]"
    ) -> None:
        model = self.model(request.model)
        text = ChoiceText(choice, model.text, request.stop)
        run = SequenceRun(self._parts, _spec(request, model, choice), model.fingerprint, self._block_tokens)
        async with aclosing(run.batches()) as batches:
            async for batch in batches:
                piece = text.push(batch.tokens)
                arrived.put_nowait((piece, batch.cached_tokens))
                if text.is_finished:
                    return

    async def keep_ready(self) -> None:
        """Prove the cluster's path with a real token at start and whenever none passed lately."""
        while True:
            await asyncio.sleep(LOOK_S if self._not_ready is None else CANARY_RETRY_S)
            if self._wait_for_members():
                continue
            is_due = (
                self._not_ready is not None
                or self._last_token_s is None
                or self._clock.now() - self._last_token_s > self._config.canary_interval_s
                # Whoever comes back must prove the path first.
                or not self._parts.table.usable()
            )
            if is_due:
                self._not_ready = await self._try_canary()

    def _wait_for_members(self) -> bool:
        """Return whether a configured process has never been ready; readiness waits for each once."""
        members = self._parts.table.members
        self._started_members.update(address for address, member in members.items() if member.is_usable)
        missing = sorted(members.keys() - self._started_members)
        if missing:
            self._not_ready = "starting: waiting for " + ", ".join(missing)
        return bool(missing)

    async def _try_canary(self) -> str | None:
        """Answer one token through the front door's own path; return why that failed, or None."""
        served = self._served
        if served is None:
            return "no worker has been met"
        now_ms = self._clock.unix_ms()
        spec = SequenceSpec(
            sequence_id=SequenceId(f"canary-{self._config.name}-{now_ms}"),
            model=served.name,
            prompt=(0,),
            sampling=SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True),
            deadline_unix_ms=now_ms + int(CANARY_TIMEOUT_S * 1000),
        )
        run = SequenceRun(self._parts, spec, served.fingerprint, self._block_tokens)
        try:
            async with asyncio.timeout(CANARY_TIMEOUT_S), aclosing(run.batches()) as batches:
                async for _ in batches:
                    self._last_token_s = self._clock.now()
        except TimeoutError:
            return DeadlineExceeded("the canary token did not come in time").message
        except HeadraceError as error:
            return f"the canary token failed: {error.code}: {error.message}"
        return None


def _spec(request: GenerationRequest, model: ServedModel, choice: int) -> SequenceSpec:
    return SequenceSpec(
        sequence_id=SequenceId(f"{request.request_id}-{choice}"),
        model=model.name,
        prompt=request.prompt,
        sampling=request.sampling,
        choice=choice,
        deadline_unix_ms=request.deadline_unix_ms,
        cache_key=request.cache_key,
        tenant=request.tenant,
    )


def _with_usage(piece: Piece, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Piece:
    usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, cached_tokens=cached_tokens)
    return Piece(choice=piece.choice, text=piece.text, tokens=piece.tokens, finish=piece.finish, usage=usage)
