"""One owner for each mutable thing: a bounded mailbox and one message at a time."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from headrace.errors import Draining, Saturated

logger = logging.getLogger(__name__)

MessageT = TypeVar("MessageT")
ReplyT = TypeVar("ReplyT")

SATURATED_RETRY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorStats:
    """A snapshot of a mailbox.

    Attributes:
        depth: Messages waiting now.
        max_depth: Most messages that ever waited.
        num_handled: Messages handled, well or not.
        num_failed: Messages whose handler raised.
    """

    depth: int
    max_depth: int
    num_handled: int
    num_failed: int


class Actor(Generic[MessageT]):
    """Hands messages to `handle`, one at a time, in order; lives until `stop` or its task group ends.

    A handler that raises fails the question it was answering and nothing else. A question may be
    answered later than its handler returns; those still open when the actor ends fail with Draining.

    Args:
        name: Goes into logs and errors.
        handle: Called with each message; the only writer of the actor's state.
        capacity: Most messages that wait.
    """

    def __init__(self, name: str, handle: Callable[[MessageT], Awaitable[None]], capacity: int) -> None:
        self._name = name
        self._handle = handle
        self._capacity = capacity
        self._waiting: deque[tuple[MessageT, asyncio.Future[object] | None]] = deque()
        self._open: set[asyncio.Future[object]] = set()
        self._changed = asyncio.Event()
        self._is_stopping = False
        self._task: asyncio.Task[None] | None = None
        self._max_depth = 0
        self._num_handled = 0
        self._num_failed = 0

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Begin to handle messages; those told earlier have waited."""
        self._task = tasks.create_task(self._run(), name=f"actor {self._name}")

    def tell(self, message: MessageT) -> None:
        """Send a message without waiting.

        Raises:
            Saturated: the mailbox is full.
            Draining: the actor is ending.
        """
        self._put(message, None)

    async def ask(self, make_message: Callable[["asyncio.Future[ReplyT]"], MessageT]) -> ReplyT:
        """Send a question and wait for its answer; a cancelled caller leaves the question in the mailbox.

        Args:
            make_message: Makes the message from the future that its handler resolves.

        Raises:
            Saturated: the mailbox is full.
            Draining: the actor ended before it answered.
        """
        reply: asyncio.Future[ReplyT] = asyncio.get_running_loop().create_future()
        self._put(make_message(reply), reply)  # type: ignore[arg-type]  # a future is invariant in its result
        return await reply

    async def stop(self, grace_s: float) -> None:
        """Accept no message any more, handle the waiting ones for at most `grace_s`, then end."""
        self._is_stopping = True
        self._changed.set()
        if self._task is None:
            self._fail_open()
            return
        _, unfinished = await asyncio.wait([self._task], timeout=grace_s)
        for task in unfinished:
            logger.warning("actor did not drain in time", extra={"actor": self._name, "depth": len(self._waiting)})
            task.cancel()
            await asyncio.wait([task])

    def stats(self) -> ActorStats:
        """Return the counters."""
        return ActorStats(
            depth=len(self._waiting),
            max_depth=self._max_depth,
            num_handled=self._num_handled,
            num_failed=self._num_failed,
        )

    def _put(self, message: MessageT, reply: "asyncio.Future[object] | None") -> None:
        if self._is_stopping:
            raise self._ended()
        if len(self._waiting) >= self._capacity:
            raise Saturated(
                f"mailbox of {self._name} is full", limit=str(self._capacity), retry_after_s=SATURATED_RETRY_S
            )
        self._waiting.append((message, reply))
        self._max_depth = max(self._max_depth, len(self._waiting))
        if reply is not None:
            self._open.add(reply)
            reply.add_done_callback(self._open.discard)
        self._changed.set()

    async def _run(self) -> None:
        try:
            while self._waiting or not self._is_stopping:
                self._changed.clear()
                while self._waiting:
                    await self._handle_one(*self._waiting.popleft())
                if not self._is_stopping:
                    await self._changed.wait()
        finally:
            self._is_stopping = True
            self._waiting.clear()
            self._fail_open()

    async def _handle_one(self, message: MessageT, reply: "asyncio.Future[object] | None") -> None:
        try:
            await self._handle(message)
        except Exception as error:  # noqa: BLE001 the owner of a state outlives a bug in handling one message
            self._num_failed += 1
            kind = type(message).__name__
            logger.exception("actor failed on a message", extra={"actor": self._name, "kind": kind})
            if reply is not None and not reply.done():
                reply.set_exception(error)
        finally:
            self._num_handled += 1

    def _fail_open(self) -> None:
        for reply in tuple(self._open):
            if not reply.done():
                reply.set_exception(self._ended())

    def _ended(self) -> Draining:
        return Draining(f"{self._name} is ending: ask another process")
