"""A worker whose lanes to other pools are slow: `paced_worker.py LATENCY_S BYTE_S ROLE --set ...`, else headrace serve.

A fetch pays `LATENCY_S` once, and `BYTE_S` for every byte, as pauses after each READ. A pause ends no READ late by its
deadline, as a slow network would: the lane is to be measured, not given up.
"""

import asyncio
import sys
import time
from typing import Any
from unittest.mock import patch

from headrace.cli import serve, worker
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
        self._ended_s = 0.0

    async def read(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 those of the class it extends
        """Copy a peer's blocks, and wait as long as a slow lane would take for as many bytes."""
        async with self._turn:
            begun_s, before = time.monotonic(), self.stats().read_bytes
            await super().read(*args, **kwargs)
            first_s = self.latency_s if begun_s - self._ended_s > IDLE_S else 0.0
            ends_s = begun_s + first_s + self.byte_s * (self.stats().read_bytes - before)
            await asyncio.sleep(max(0.0, ends_s - time.monotonic()))
            self._ended_s = time.monotonic()


def main() -> int:
    """Serve a worker; return its exit code."""
    latency_s, byte_s = sys.argv[1:3]
    del sys.argv[1:3]
    PacedConnector.latency_s, PacedConnector.byte_s = float(latency_s), float(byte_s)
    with patch.object(worker, "NixlConnector", PacedConnector):
        return serve.main()


if __name__ == "__main__":
    sys.exit(main())
