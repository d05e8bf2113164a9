"""All contexts of an ingestor: opened within quotas, found again, ended when nobody cares any more."""

import asyncio
import dataclasses
import logging
import secrets
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from headrace.core.context import ContextId, ContextMode
from headrace.core.draft import draft_from_proto
from headrace.core.tenancy import Tenancy
from headrace.core.validate import RequestLimits, build_request
from headrace.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    HeadraceError,
    InvalidRequest,
    Overloaded,
    Saturated,
    UnknownContext,
)
from headrace.ingestor.parts import FULL_RETRY_S, IngestParts
from headrace.ingestor.prompt import ChatPrompt, PlainPrompt, PromptText
from headrace.ingestor.run import RouterRun
from headrace.ingestor.session import Opening, Session, overdue
from headrace.runtime.off_loop import off_loop
from headrace.v1 import router_pb2

logger = logging.getLogger(__name__)

SWEEP_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a client opens a context with.

    Attributes:
        request: How to answer, and what stands before the context.
        mode: How the context may change.
        timeout_s: Seconds to the end of the answer; None takes the default.
        is_unattended: Whether calls come and go.
        tenant: Checked name of who asks.
    """

    request: router_pb2.GenerateRequest
    mode: ContextMode
    timeout_s: float | None
    is_unattended: bool
    tenant: str


class Sessions:
    """Owns the contexts of an ingestor.

    Args:
        parts: What they share.

    Attributes:
        is_draining: Whether no context is opened any more.
    """

    def __init__(self, parts: IngestParts) -> None:
        self._parts = parts
        self._sessions: dict[ContextId, Session] = {}
        self._runs: dict[ContextId, asyncio.Task[None]] = {}
        self.is_draining = False

    def live(self) -> list[Session]:
        """Return those that have not ended."""
        return [session for session in self._sessions.values() if not session.has_ended]

    @property
    def num_kept(self) -> int:
        """Contexts that have ended and are still told of."""
        return len(self._sessions) - len(self.live())

    async def open(self, wanted: Wanted) -> Session:
        """Begin a context.

        Raises:
            InvalidRequest: something of it is out of range.
            Overloaded: the tenant has too many.
            Saturated: all have too many.
            NotReady: no router answers, or this process is leaving.
        """
        self._admit(wanted.tenant)
        card = await self._parts.routers.model(wanted.request.model)
        num_chars = self._num_chars_around(wanted.request)
        prompt = await off_loop(num_chars, lambda: self._prompt(wanted.request))
        opening = dataclasses.replace(self._opening(wanted, card, prompt), num_chars_around=num_chars)
        session = Session(opening, self._parts)
        await session.begin()
        try:
            self._admit(wanted.tenant)  # Others may have come meanwhile.
        except HeadraceError as error:
            session.end(error)
            raise
        self._parts.counts.opened += 1
        self._start(session)
        return session

    def resume(self, context_id: str, tenant: str) -> Session:
        """Return a context that is still there.

        Raises:
            UnknownContext: it is not, or it is another tenant's.
            HeadraceError: why it has ended before its answer was complete.
        """
        session = self._sessions.get(ContextId(context_id))
        if session is None or session.opening.tenant != tenant or session.is_abandoned:
            raise UnknownContext("there is no such context, or not any more", field="context_id")
        if session.failure is not None:
            raise dataclasses.replace(session.failure)
        self._parts.counts.resumed += 1
        return session

    async def keep_sweeping(self) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep()

    def sweep(self) -> None:
        """End the contexts whose time has come, and forget those that have ended long enough ago."""
        for session in tuple(self._sessions.values()):
            reason = self._overdue(session)
            if reason is not None:
                logger.info("context expired", extra={"error": reason.code})
                self._parts.counts.expired += 1
                session.end(reason)
                session.is_abandoned |= isinstance(reason, Cancelled)
            if self._is_forgotten(session):
                self._sessions.pop(session.opening.context_id)
        self._forget_most()

    def _is_forgotten(self, session: Session) -> bool:
        """Return whether nobody may take it up any more."""
        if session.ended_s is None:
            return False
        quiet_s = self._parts.clock.now() - max(session.ended_s, session.left_s)
        return session.is_abandoned or (not session.num_calls and quiet_s >= self._parts.config.grace_s)

    def _forget_most(self) -> None:
        """Forget the oldest ended contexts of the tenants that have most of them, down to as many as may be kept."""
        ended: defaultdict[str, deque[Session]] = defaultdict(deque)
        for session in sorted(self._sessions.values(), key=lambda each: each.ended_s or 0.0):
            if session.has_ended:
                ended[session.opening.tenant].append(session)
        for _ in range(sum(map(len, ended.values())) - self._parts.config.max_ended):
            most = max(ended.values(), key=len)
            self._sessions.pop(most.popleft().opening.context_id)

    def end_all(self, reason: Callable[[], HeadraceError]) -> None:
        """End all contexts."""
        for session in self.live():
            session.end(reason())

    async def idle(self) -> None:
        """Wait until no context is open or being answered."""
        while self._runs:
            await asyncio.wait(tuple(self._runs.values()), return_when=asyncio.FIRST_COMPLETED)

    def _start(self, session: Session) -> None:
        name = session.opening.context_id
        task = self._parts.tasks.create_task(RouterRun(session, self._parts).run())
        self._sessions[name], self._runs[name] = session, task
        task.add_done_callback(lambda _: self._runs.pop(name, None))

        def stop() -> None:
            if asyncio.current_task() is not task:
                task.cancel()

        session.on_end = stop

    def _overdue(self, session: Session) -> HeadraceError | None:
        """Return why a context is to be ended now."""
        config, now_s = self._parts.config, self._parts.clock.now()
        if session.has_ended:
            return None
        if self._parts.clock.unix_ms() >= session.opening.deadline_unix_ms:
            return overdue()
        if not session.is_closed and now_s >= self._quiet_since_s(session) + config.idle_s:
            return DeadlineExceeded(
                f"nothing came for the context for {config.idle_s:g} s", field="operation", limit=f"{config.idle_s:g} s"
            )
        waits = session.opening.is_unattended and not session.is_closed
        if not session.num_calls and not waits and now_s >= session.left_s + config.grace_s:
            return Cancelled(f"nobody came back to the context within {config.grace_s:g} s")
        return None

    def _quiet_since_s(self, session: Session) -> float:
        """Return since when an open context does nothing and has nothing to wait for."""
        if not session.is_awaited:
            return session.active_s
        # What waits for a checkpoint is a call, or one that may come back in its time of grace.
        has_waiter = session.num_calls > 0 or not session.opening.is_unattended
        return self._parts.clock.now() if has_waiter else max(session.active_s, session.left_s)

    def _admit(self, tenant: str) -> None:
        """Refuse a context that is one too many.

        Raises:
            Draining, Saturated, Overloaded: it is.
        """
        if self.is_draining:
            raise Draining("this ingestor is leaving: ask another", retry_after_s=FULL_RETRY_S)
        config, live = self._parts.config, self.live()
        if len(live) >= config.max_streams:
            raise Saturated(f"{len(live)} contexts are open", limit=str(config.max_streams), retry_after_s=FULL_RETRY_S)
        num_own = sum(session.opening.tenant == tenant for session in live)
        if num_own >= config.max_tenant_streams:
            raise Overloaded(
                f"{num_own} contexts of this tenant are open",
                field="x-tenant-id",
                limit=str(config.max_tenant_streams),
                retry_after_s=FULL_RETRY_S,
            )

    def _num_chars_around(self, request: router_pb2.GenerateRequest) -> int:
        """Return how long what stands before a context is.

        Raises:
            InvalidRequest: it is too long.
        """
        num_chars = len(request.text) + sum(len(message.content) for message in request.chat.messages)
        limit = self._parts.config.max_context_chars
        if num_chars > limit:
            raise InvalidRequest(
                f"what stands before the context has {num_chars} characters",
                field="request",
                limit=f"{limit} characters",
            )
        return num_chars

    def _opening(self, wanted: Wanted, card: router_pb2.ModelCard, prompt: PromptText) -> Opening:
        """Return the checked opening of a context.

        Raises:
            InvalidRequest: a value is out of range.
        """
        config, request = self._parts.config, wanted.request
        limits = RequestLimits(
            model=card.name,
            max_context_tokens=card.max_context_tokens,
            vocab_size=self._parts.model.vocab_size,
            default_timeout_s=config.default_timeout_s,
            max_timeout_s=config.max_timeout_s,
        )
        if request.num_choices > 1:
            raise InvalidRequest("a context has one answer", field="request.num_choices", limit="1")
        draft = draft_from_proto(
            request,
            (),
            tenant=wanted.tenant,
            timeout_s=wanted.timeout_s,
            request_id="ctx-" + secrets.token_hex(12),
            fresh_seed=self._parts.entropy(),
        )
        # Whether the tenant may use the public scope is the router's to say.
        checked = build_request(draft, limits, Tenancy(), now_unix_ms=self._parts.clock.unix_ms(), is_open=True)
        template = router_pb2.GenerateRequest()
        template.CopyFrom(request)
        for field in ("text", "tokens", "chat"):
            template.ClearField(field)
        template.model, template.request_id = card.name, checked.request_id
        template.sampling.seed = checked.sampling.seed
        return Opening(
            context_id=ContextId(f"{config.name}.{secrets.token_urlsafe(24)}"),
            tenant=wanted.tenant,
            request=template,
            mode=wanted.mode,
            limits=limits,
            deadline_unix_ms=checked.deadline_unix_ms,
            is_unattended=wanted.is_unattended,
            is_chat=isinstance(prompt, ChatPrompt),
            prompt=prompt,
        )

    def _prompt(self, request: router_pb2.GenerateRequest) -> PromptText:
        match request.WhichOneof("prompt"):
            case "chat":
                messages = [{"role": each.role, "content": each.content} for each in request.chat.messages]
                return ChatPrompt(self._parts.model, messages)
            case "text":
                return PlainPrompt(request.text)
            case "tokens":
                raise InvalidRequest("a context is text: give text or chat before it", field="request.tokens")
            case _:
                return PlainPrompt("")
