"""The life of a process: start, signals, an orderly end, an exit code."""

import asyncio
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable

import uvloop

from headrace.errors import ConfigError

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_CONFIG = 2

SWITCH_INTERVAL_S = 0.001
SHUTDOWN_LIMIT_S = 30.0

_PR_SET_PDEATHSIG = 1


class Lifecycle:
    """Tells the parts of a process that it is time to leave."""

    def __init__(self) -> None:
        self._stopping = asyncio.Event()
        self._reason = ""
        self._grace_s: float | None = None

    @property
    def is_stopping(self) -> bool:
        """Whether the process is leaving."""
        return self._stopping.is_set()

    @property
    def reason(self) -> str:
        """Why it is leaving; empty while it is not."""
        return self._reason

    def grace_s(self, default_s: float) -> float:
        """Return how long running work may go on: what `stop` was given, or else `default_s`."""
        return default_s if self._grace_s is None else self._grace_s

    def stop(self, reason: str, grace_s: float | None = None) -> None:
        """Begin to leave; later reasons are ignored.

        Args:
            reason: Why.
            grace_s: How long running work may go on; None leaves it to the service.
        """
        if not self.is_stopping:
            self._reason = reason
            self._grace_s = grace_s
            logger.info("stopping", extra={"reason": reason})
            self._stopping.set()

    async def stopped(self) -> None:
        """Wait until the process begins to leave."""
        await self._stopping.wait()


def run_service(
    main: Callable[[Lifecycle], Awaitable[None]],
    *,
    exit_with_parent: bool = False,
    shutdown_limit_s: float = SHUTDOWN_LIMIT_S,
) -> int:
    """Run a process from start to exit code; call it once, from the main thread.

    The first SIGTERM or SIGINT asks `main` to leave, the second ends the process at once, and so does
    a `main` that takes longer than `shutdown_limit_s` to leave (the stacks of all threads are written).

    Args:
        main: Runs the service; returns when it has left.
        exit_with_parent: Leave when the process that started this one ends (Linux).
        shutdown_limit_s: Longest time to leave.

    Returns:
        0 after an orderly end, 1 after a failure, 2 when the configuration refuses to start.
    """
    # The engine's thread takes the GIL between tensor operations. With Python's default of 5 ms the event loop
    # would wait that long each time, and 5 ms in all is what a loop may ever be late.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    lifecycle = Lifecycle()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_supervise(main, lifecycle, exit_with_parent=exit_with_parent, limit_s=shutdown_limit_s))
    except ConfigError as error:
        return _refuse(error)
    except BaseExceptionGroup as group:
        refused = group.subgroup(ConfigError)
        if refused is not None:
            return _refuse(_first_leaf(refused))
        logger.critical("process failed", exc_info=group)
        return EXIT_FAILED
    except Exception:
        logger.critical("process failed", exc_info=True)
        return EXIT_FAILED
    logger.info("process ended", extra={"reason": lifecycle.reason or "done"})
    return 0


async def _supervise(
    main: Callable[[Lifecycle], Awaitable[None]], lifecycle: Lifecycle, *, exit_with_parent: bool, limit_s: float
) -> None:
    watchdog = threading.Timer(limit_s, _give_up)
    watchdog.daemon = True

    def on_signal(number: signal.Signals) -> None:
        if lifecycle.is_stopping:
            os._exit(128 + number)
        lifecycle.stop(number.name)
        watchdog.start()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    if exit_with_parent and not _follow_parent():
        lifecycle.stop("parent is gone")
    try:
        await main(lifecycle)
    finally:
        watchdog.cancel()


def _follow_parent() -> bool:
    """Ask the kernel for SIGTERM when the parent ends; return whether the parent still lives.

    An orphan must not stay: its transfer library's progress thread would burn a core for ever.
    """
    if sys.platform != "linux":
        return True
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return os.getppid() == parent


def _give_up() -> None:
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    os._exit(EXIT_FAILED)


def _refuse(error: BaseException) -> int:
    sys.stderr.write(f"headrace refuses to start: {error}\n")
    return EXIT_CONFIG


def _first_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
