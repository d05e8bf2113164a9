"""The engine's own thread: the event loop never waits for a step."""

import logging
import threading
from collections import deque

import torch

from headrace.clock import Clock
from headrace.engine.cores import Cores
from headrace.engine.engine import Engine
from headrace.engine.messages import (
    Begin,
    EngineCommand,
    EngineStats,
    Failed,
    HoldWriter,
    Keep,
    ListHolders,
    Open,
    Pin,
    Quarantine,
    Report,
    Revise,
    StartEarly,
)
from headrace.errors import Draining, HeadraceError, InternalError, Saturated

logger = logging.getLogger(__name__)

MAX_QUEUED_COMMANDS = 4096
"""A step of a second at thousands of requests a second; beyond it new work is refused."""

MAX_WAIT_S = 3600.0

_REFUSABLE = (Open, Revise, Report, Begin, StartEarly, Keep, Pin, HoldWriter, Quarantine, ListHolders)


class EngineThread:
    """Runs an engine until stopped; commands are applied between steps, idling costs nothing.

    Args:
        engine: Used by this thread only, once started.
        clock: Bounds waits by the engine's next deadline.
        cores: Entered on the thread while there is work, and told of every step; None computes alone.
    """

    def __init__(self, engine: Engine, clock: Clock, cores: Cores | None = None) -> None:
        self._engine = engine
        self._clock = clock
        self._cores = cores or Cores(torch.get_num_threads())
        self._commands: deque[EngineCommand] = deque()
        self._wake = threading.Condition()
        self._is_stopping = False
        self._stats = engine.stats()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start stepping."""
        self._thread.start()

    def stop(self) -> None:
        """Fail what is left, end the thread and wait for it; at most one step."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs; a dead one means a bug in the engine."""
        return self._thread.is_alive()

    def send(self, command: EngineCommand) -> None:
        """Queue a command and return at once; any thread may call it.

        Raises:
            Saturated: too many commands wait. Commands that end something are never refused.
            Draining: the engine has been told to stop, or has stopped on a bug.
        """
        with self._wake:
            if isinstance(command, _REFUSABLE):
                self._require_room()
            self._commands.append(command)
            self._wake.notify()

    def stats(self) -> EngineStats:
        """Return the state after the last step."""
        return self._stats

    def _require_room(self) -> None:
        if self._is_stopping:
            raise _leaving()
        if len(self._commands) >= MAX_QUEUED_COMMANDS:
            raise Saturated("the engine's mailbox is full", limit=str(MAX_QUEUED_COMMANDS), retry_after_s=1.0)

    def _run(self) -> None:
        error: HeadraceError = _leaving()
        try:
            self._step_until_stopped()
        except Exception:
            logger.exception("engine stopped")
            error = InternalError("the engine stopped on a bug; its log has the cause")
        with self._wake:
            self._is_stopping = True
        self._refuse_queued(error)
        self._engine.fail_all(error)
        self._stats = self._engine.stats()

    def _step_until_stopped(self) -> None:
        while self._wait():
            self._apply_all()
            with self._cores:
                begun_s = self._clock.now()
                while self._engine.step() and not self._is_stopping:
                    self._stats = self._engine.stats()
                    num_users = self._stats.num_running + self._stats.num_waiting
                    self._cores.end_step(self._clock.now() - begun_s, num_users)
                    self._apply_all()
                    begun_s = self._clock.now()
            self._stats = self._engine.stats()

    def _refuse_queued(self, error: HeadraceError) -> None:
        """Answer the commands that somebody waits for; nothing that matters can follow them."""
        while self._commands:
            match self._commands.popleft():
                case Open(spec=spec, sink=sink):
                    sink(Failed(sequence_id=spec.sequence_id, error=error))
                case Pin(reply=answer_pin):
                    answer_pin(())
                case Quarantine(reply=answer_quarantine):
                    answer_quarantine(False)  # noqa: FBT003 it was not here
                case ListHolders(reply=answer_list):
                    answer_list(())
                case _:
                    pass

    def _wait(self) -> bool:
        """Sleep until there is a command, a deadline or the end; False at the end."""
        deadline_s = self._engine.next_deadline_s()
        # The bound keeps far deadlines within what a condition can wait for.
        timeout_s = None if deadline_s is None else min(max(0.0, deadline_s - self._clock.now()), MAX_WAIT_S)
        with self._wake:
            self._wake.wait_for(lambda: bool(self._commands) or self._is_stopping, timeout_s)
            return not self._is_stopping

    def _apply_all(self) -> None:
        while self._commands:
            self._engine.apply(self._commands.popleft())


def _leaving() -> Draining:
    return Draining("this worker is leaving: ask another", retry_after_s=1.0)
