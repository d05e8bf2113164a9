"""Threads per tensor operation, shared with the other workers of a machine."""

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from headrace.errors import ConfigError

MOST_SEATS = 256
TURN_POLL_S = 0.02
_TURN = 2 * MOST_SEATS
"""Byte behind those of the seats and of the computing."""
_USERS = _TURN + 1
"""Bytes of those that come first: one for each user who waits, `MOST_USERS` per seat."""
MOST_USERS = 16
LONGEST_REST_S = 0.25
REST_POLL_S = 0.005
_FLOCK = struct.Struct("hhqqi")
"""`struct flock` of 64-bit Linux: type, whence, start, length, pid."""


class Cores:
    """The cores a worker computes on: all of them, or its share while other workers compute too.

    Two workers whose threads spin for each other on the same cores are many times slower than two
    with one core each, and one that leaves cores idle is slower than it need be. So workers that
    name the same file tell each other through locks on its bytes when they have work; the kernel
    frees the bytes of a worker that died.

    2-core Zen 3, bf16, 2026-11-21, two workers at once, decode step / 128-token prompt: 42 / 440 ms
    with a core each, 53 / 488 ms with two threads each and sleeping barriers; one alone: 28 / 250 ms.

    A user waits for the whole of a prompt, but reads an answer slower than it is made. So some workers come
    first, and others rest after each step while those compute: longer, the more users wait.

    Use it as a context while there is work, from one thread, the one that computes.
    """

    def __init__(
        self, threads: int, shared: Path | None = None, *, comes_first: bool = False, give_way: float = 0.0
    ) -> None:
        """Take a seat among the workers of this machine.

        Args:
            threads: Most threads, 1 or more.
            shared: File that all workers of this machine name; None shares with nobody.
            comes_first: Whether others may give way to this worker.
            give_way: How long this one rests after a step for each user who waits for workers that come first, in
                times of the step.

        Raises:
            ConfigError: The file cannot be opened, or has no seat left.
        """
        self._most = threads
        self._comes_first = comes_first
        self._give_way = give_way
        self._num_users = 0
        self._file: int | None = None
        if shared is not None:
            self._file, self._seat = _take_seat(shared)

    @property
    def most_threads(self) -> int:
        """Threads where no other worker computes."""
        return self._most

    def close(self) -> None:
        """Leave the seat."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        """Begin to compute."""
        if self._file is not None:
            _lock(self._file, MOST_SEATS + self._seat)
            if self._comes_first:
                self._tell(self._file, 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End computing: the cores go to others."""
        if self._file is not None:
            _unlock(self._file, MOST_SEATS + self._seat)
            if self._comes_first:
                self._tell(self._file, 0)

    def end_step(self, step_s: float, num_users: int) -> None:
        """Tell how many users wait for this worker, if it comes first; let others have the cores, if they do.

        Args:
            step_s: How long the step took that has just ended.
            num_users: How many requests this worker has.
        """
        if self._file is None:
            return
        if self._comes_first:
            self._tell(self._file, min(max(1, num_users), MOST_USERS))
        elif self._give_way > 0:
            self._rest(self._file, step_s)

    def _tell(self, file: int, num_users: int) -> None:
        first = _USERS + self._seat * MOST_USERS
        if num_users > self._num_users:
            _lock(file, first, num_users)
        elif num_users < self._num_users:
            _unlock(file, first + num_users, MOST_USERS - num_users)
        self._num_users = num_users

    def _rest(self, file: int, step_s: float) -> None:
        num_users = _num_locked(file, _USERS, MOST_SEATS * MOST_USERS)
        if not num_users:
            return
        self.__exit__(None, None, None)
        end_s = time.monotonic() + min(LONGEST_REST_S, self._give_way * num_users * step_s)
        while (left_s := end_s - time.monotonic()) > 0 and _num_locked(file, _USERS, MOST_SEATS * MOST_USERS):
            time.sleep(min(left_s, REST_POLL_S))
        self.__enter__()

    @contextmanager
    def turn(self, timeout_s: float) -> Iterator[None]:
        """Measure one after the other: wait until no other worker of this machine is in its turn.

        Args:
            timeout_s: Longest wait; after it the turn begins all the same.
        """
        is_mine = self._file is None or self._take_turn(self._file, timeout_s)
        try:
            yield
        finally:
            if self._file is not None and is_mine:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _TURN)

    @staticmethod
    def _take_turn(file: int, timeout_s: float) -> bool:
        for _ in range(1 + int(timeout_s / TURN_POLL_S)):
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _TURN)
            except OSError:
                time.sleep(TURN_POLL_S)
            else:
                return True
        return False

    def share(self) -> int:
        """Return how many threads to use now; takes microseconds, but the interpreter too."""
        return max(1, self._most // (1 + self.num_others()))

    def num_others(self) -> int:
        """Return how many other workers compute now."""
        return 0 if self._file is None else _num_locked(self._file, MOST_SEATS, MOST_SEATS)


def _lock(file: int, first: int, count: int = 1) -> None:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)


def _unlock(file: int, first: int, count: int = 1) -> None:
    fcntl.lockf(file, fcntl.LOCK_UN, count, first)


def _num_locked(file: int, first: int, count: int) -> int:
    """Return how many of `count` bytes from `first` on others have locked."""
    found, start, end = 0, first, first + count
    while start < end:
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, end - start, 0)
        kind, _, begin, length, _ = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, wanted))
        if kind == fcntl.F_UNLCK:
            break
        after = min(end, begin + length)
        found, start = found + after - max(start, begin), after
    return found


def _take_seat(path: Path) -> tuple[int, int]:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"the file of shared cores {path} cannot be opened: {error}", field="shared_cores") from error
    for seat in range(MOST_SEATS):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, seat)
        except OSError:
            continue
        return file, seat
    os.close(file)
    raise ConfigError(
        f"{MOST_SEATS} workers share the cores of this machine already", field="shared_cores", limit=str(MOST_SEATS)
    )
