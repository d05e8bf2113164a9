"""A context on its way through a router: what is known is sent, what comes back is taken in."""

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc.aio

from headrace.core.common_prefix import num_common
from headrace.core.kept_since import KeptSince
from headrace.core.wire import piece_from_proto
from headrace.errors import Cancelled, DeadlineExceeded, HeadraceError, InternalError, PeerFailed
from headrace.ingestor.parts import IngestParts
from headrace.ingestor.repeated import RepeatedAnswer
from headrace.ingestor.routers import is_movable, metadata_of
from headrace.ingestor.session import Session, overdue
from headrace.runtime.channels import translate_errors
from headrace.v1 import generate_pb2, router_pb2

if TYPE_CHECKING:
    Call = grpc.aio.StreamStreamCall[router_pb2.GenerateContextRequest, router_pb2.GenerateContextResponse]

logger = logging.getLogger(__name__)

PAUSE_S = 0.2
MOST_PAUSE_S = 2.0
"""Pauses between attempts double up to this, until a router is heard again."""

MAX_ID_CHARS = 128


class RouterRun:
    """Carries one context, and then its answer, over the loss of its router.

    While the context is open nothing is lost with a router but time: the next one gets all that is known. An answer
    that broke off is asked for again, and what has arrived of it already is left out: with the same seed it has the
    same tokens.

    Args:
        session: Whose tokens are sent and whose answer is brought.
        parts: What all contexts share.
    """

    def __init__(self, session: Session, parts: IngestParts) -> None:
        self._session = session
        self._parts = parts
        self._num_attempts = 0
        self._sent: list[int] = []
        self._num_final = 0
        self._kept = KeptSince()
        self._is_rewritten = False
        self._answer = RepeatedAnswer()
        self._pause_s = PAUSE_S
        self._lost_s: float | None = None

    async def run(self) -> None:
        """Go on until the context has ended; failures end it."""
        try:
            while not self._session.has_ended:
                await self._until_known()
                try:
                    await self._attempt()
                except HeadraceError as error:
                    if not is_movable(error) or self._is_given_up():
                        raise
                    logger.info("context is sent again", extra={"error": error.code})
                    self._session.note_lost()
                    await asyncio.sleep(min(self._pause_s, self._remaining_s()))
                    self._pause_s = min(2 * self._pause_s, MOST_PAUSE_S)
        except HeadraceError as error:
            self._session.end(error)
        except Exception:  # noqa: BLE001 a bug in one context must not end the ingestor's task group
            logger.exception("context failed")
            self._session.end(InternalError("the ingestor failed on this context; its log has the cause"))

    def _is_given_up(self) -> bool:
        """Return whether the answer was asked for in vain for long enough; an open context has time."""
        now_s = self._parts.clock.now()
        if not self._session.is_closed:
            return False
        if self._lost_s is None:
            self._lost_s = now_s
        return now_s >= self._lost_s + self._parts.config.reopen_s

    async def _until_known(self) -> None:
        """Wait for the first tokens: which workers suit a context is asked once, with all that is known then."""
        session = self._session
        while True:
            changed = session.changed
            if session.known and (session.is_closed or session.state().applied):
                return
            await changed.wait()

    async def _attempt(self) -> None:
        routers = self._parts.routers
        address = routers.address
        call: Call = routers.stub(address).GenerateContext(
            timeout=self._remaining_s(), metadata=metadata_of(self._session.opening.tenant)
        )
        self._is_rewritten = False
        self._answer.begin()
        writing = self._parts.tasks.create_task(self._write(call))
        try:
            async with translate_errors(address):
                async for response in call:
                    self._take(response)
            if not self._session.has_ended:
                raise PeerFailed("the router ended its stream before the answer was complete", worker=address)
        except HeadraceError as error:
            if self._is_rewritten:
                return
            if isinstance(error, Cancelled):
                # Nobody here cancelled it: the router has left.
                error = PeerFailed("the router left during the call", worker=address)
            if isinstance(error, DeadlineExceeded):
                error = overdue()  # Clients do not know the router by the address it has here.
            if is_movable(error):
                routers.avoid(address)
            raise error
        finally:
            call.cancel()
            writing.cancel()
            await asyncio.wait([writing])

    def _remaining_s(self) -> float:
        left_s = (self._session.opening.deadline_unix_ms - self._parts.clock.unix_ms()) / 1000
        if left_s <= 0:
            raise overdue()
        return left_s

    # -- To the router -------------------------------------------------------------

    async def _write(self, call: "Call") -> None:
        try:
            # A call that has ended refuses writes in several ways; whoever reads it learns why.
            with suppress(grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
                await self._send(call)
        except Exception:  # noqa: BLE001 a bug in one context must not end the ingestor's task group
            logger.exception("context was not sent")
            self._session.end(InternalError("the ingestor failed on this context; its log has the cause"))

    async def _send(self, call: "Call") -> None:
        session = self._session
        self._sent, self._kept, self._num_final = session.known, KeptSince(), session.num_final
        opening = router_pb2.GenerateContextRequest(open=self._opening(self._sent), final_tokens=self._num_final)
        self._parts.counts.sent_tokens += len(self._sent)
        await call.write(opening)
        while True:
            changed = session.changed
            if not session.is_closed and session.known is not self._sent:
                await self._coalesce()
            if session.is_closed or session.known is not self._sent:
                if not await self._revise(call):
                    return
            await changed.wait()

    def _opening(self, known: list[int]) -> router_pb2.GenerateRequest:
        request = router_pb2.GenerateRequest()
        request.CopyFrom(self._session.opening.request)
        # A router that lost the context may still be busy with it under its name.
        if self._num_attempts:
            number = f".{self._num_attempts}"
            request.request_id = request.request_id[: MAX_ID_CHARS - len(number)] + number
        self._num_attempts += 1
        request.tokens.token_ids.extend(known)
        return request

    async def _coalesce(self) -> None:
        """Wait a little for further changes, but not once it is closed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._parts.config.coalesce_s):
                while not self._session.is_closed:
                    await self._session.changed.wait()

    async def _revise(self, call: "Call") -> bool:
        """Send what is known now; return whether more may follow."""
        session, counts = self._session, self._parts.counts
        known, is_closed = session.known, session.is_closed
        num_kept = num_common(self._sent, known)
        if num_kept < self._num_final:
            # A chat template that changes what it said before: others may have found its blocks already.
            self._is_rewritten = True
            call.cancel()
            return False
        counts.revisions += 1
        counts.sent_tokens += len(known) - num_kept
        counts.dropped_tokens += len(self._sent) - num_kept
        self._kept.revise(num_kept)
        self._sent, self._num_final = known, session.num_final
        revision = generate_pb2.ContextRevision(
            version=self._kept.version,
            kept_tokens=num_kept,
            token_ids=known[num_kept:],
            final_tokens=0 if is_closed else self._num_final,
            is_closed=is_closed,
        )
        await call.write(router_pb2.GenerateContextRequest(revision=revision))
        if is_closed:
            await call.done_writing()
        return not is_closed

    # -- From the router -----------------------------------------------------------

    def _take(self, response: router_pb2.GenerateContextResponse) -> None:
        self._pause_s = PAUSE_S
        if response.HasField("piece"):
            self._lost_s = None
            piece = self._answer.fresh(piece_from_proto(response.piece))
            if piece.text or piece.tokens or piece.finish is not None:
                self._session.add(piece)
            return
        progress = response.progress
        num_computed = self._kept.still(progress.version, progress.computed_tokens)
        if num_computed:
            self._session.note_computed(self._sent, num_computed)
