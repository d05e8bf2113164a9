"""A worker that writes down when it read blocks and when it computed: `traced_worker.py FILE ROLE --set ...`.

When it ends it leaves a JSON line per interval in the file, `[kind, begin, end]` in seconds of the system's monotonic
clock: `read` is one READ, `fetch` from the choice of sources until all of it has landed, `step` what the engine
computes without waiting for a layer to land.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from headrace.cli import serve, worker
from headrace.engine.batch import Batch
from headrace.engine.runner import ModelRunner
from headrace.transfer.nixl import NixlConnector
from headrace.worker.blocks import BlockExchange
from headrace.worker.engine import OpenSequence

INTERVALS: list[tuple[str, float, float]] = []


class TracedConnector(NixlConnector):
    """Moves blocks by NIXL."""

    async def read(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 those of the class it extends
        """Copy a peer's blocks."""
        begun_s = time.monotonic()
        try:
            await super().read(*args, **kwargs)
        finally:
            INTERVALS.append(("read", begun_s, time.monotonic()))


class TracedExchange(BlockExchange):
    """Fills a sequence's blocks."""

    async def fetch(self, sequence: OpenSequence) -> int:
        """Fetch what is worth it."""
        begun_s = time.monotonic()
        try:
            return await super().fetch(sequence)
        finally:
            INTERVALS.append(("fetch", begun_s, time.monotonic()))


class TracedRunner(ModelRunner):
    """Computes steps."""

    def run(self, batch: Batch) -> torch.Tensor:
        """Compute a step."""
        begun_s = time.monotonic()

        def await_layer(layer: int) -> None:
            nonlocal begun_s
            INTERVALS.append(("step", begun_s, time.monotonic()))
            if batch.await_layer is not None:
                batch.await_layer(layer)
            begun_s = time.monotonic()

        try:
            return super().run(batch if batch.await_layer is None else replace(batch, await_layer=await_layer))
        finally:
            INTERVALS.append(("step", begun_s, time.monotonic()))


def main() -> int:
    """Serve a worker; return its exit code."""
    path = Path(sys.argv.pop(1))
    with (
        patch.object(worker, "NixlConnector", TracedConnector),
        patch.object(worker, "BlockExchange", TracedExchange),
        patch.object(worker, "ModelRunner", TracedRunner),
    ):
        code = serve.main()
    path.write_text("".join(json.dumps(interval) + "\n" for interval in INTERVALS))
    return code


if __name__ == "__main__":
    sys.exit(main())
