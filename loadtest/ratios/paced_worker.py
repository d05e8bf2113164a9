"""A worker whose lanes to other pools are slow: `paced_worker.py LATENCY_S BYTE_S ROLE --set ...`, else headrace serve.

A fetch pays `LATENCY_S` once, and `BYTE_S` for every byte, as pauses after each READ. Until the end of its pause a READ
is in flight for all that can tell, also one that is given up meanwhile.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

from headrace.cli import serve, worker
from headrace.core.block import Span
from headrace.errors import DeadlineExceeded
from headrace.transfer.nixl import NixlConnector

IDLE_S = 0.1
"""A READ that begins so long after the last one is the first of a fetch."""


class PacedConnector(NixlConnector):
    """Moves blocks by NIXL and pauses after READs, which it does one at a time."""

    latency_s = 0.0
    byte_s = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 those of the class it extends
        super().__init__(*args, **kwargs)
        self._turn = asyncio.Lock()
        self._ends_s = 0.0

    async def read(
        self,
        agent_name: str,
        local_ids: Sequence[int],
        remote_ids: Sequence[int],
        deadline_s: float,
        span: Span | None = None,
        on_late: Callable[[], None] | None = None,
    ) -> None:
        """Copy a peer's blocks, and wait as long as a slow lane would take for as many bytes."""
        async with self._turn:
            await asyncio.sleep(self._ends_s - time.monotonic())
            begun_s, before = time.monotonic(), self.stats().read_bytes
            await super().read(agent_name, local_ids, remote_ids, deadline_s, span, on_late)
            first_s = self.latency_s if begun_s - self._ends_s > IDLE_S else 0.0
            self._ends_s = begun_s + first_s + self.byte_s * (self.stats().read_bytes - before)
            await asyncio.sleep(min(self._ends_s, deadline_s) - time.monotonic())
        if deadline_s < self._ends_s:
            if on_late is not None:
                asyncio.get_running_loop().call_later(self._ends_s - time.monotonic(), on_late)
            raise DeadlineExceeded("the slow lane is not done")

    def when_settled(self, local_ids: Sequence[int], call: Callable[[], None]) -> None:
        """Call `call` once the lane would have brought all that was asked of it."""
        left_s = self._ends_s - time.monotonic()
        if left_s > 0:
            asyncio.get_running_loop().call_later(left_s, super().when_settled, local_ids, call)
        else:
            super().when_settled(local_ids, call)


def main() -> int:
    """Serve a worker; return its exit code."""
    latency_s, byte_s = sys.argv[1:3]
    del sys.argv[1:3]
    PacedConnector.latency_s, PacedConnector.byte_s = float(latency_s), float(byte_s)
    with patch.object(worker, "NixlConnector", PacedConnector):
        return serve.main()


if __name__ == "__main__":
    sys.exit(main())
