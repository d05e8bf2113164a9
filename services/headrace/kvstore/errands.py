"""Work that the kvstore's actor has done elsewhere, and of whose end it is told by a message."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from headrace.errors import Draining, Saturated
from headrace.kvstore.messages import Message
from headrace.runtime.actor import Actor

RETRY_S = 0.05


class Errands:
    """Runs coroutines whose result is a message; none is lost while the actor lives.

    Args:
        mailbox: Of the actor.
    """

    def __init__(self, mailbox: Actor[Message]) -> None:
        self._mailbox = mailbox
        self._tasks: asyncio.TaskGroup | None = None
        self._running: set[asyncio.Task[None]] = set()

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Run them in this group."""
        self._tasks = tasks

    def begin(self, errand: Coroutine[Any, Any, Message]) -> None:
        """Run one; the actor gets its result."""
        assert self._tasks is not None, "the actor was not started"
        task = self._tasks.create_task(self._run(errand))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def settled(self) -> None:
        """Wait until none runs: until then they use the actor's memory."""
        while self._running:
            await asyncio.wait(self._running)

    async def _run(self, errand: Coroutine[Any, Any, Message]) -> None:
        message = await errand
        while True:
            try:
                self._mailbox.tell(message)
            except Saturated:
                await asyncio.sleep(RETRY_S)
                continue
            except Draining:
                pass  # The actor has ended, and with it all that the message is about.
            return
