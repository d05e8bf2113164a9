"""Run one service; as `python -m headrace.cli.serve` too, which is `headrace serve` without the other commands.

A supervisor starts services that way: what the whole command line imports takes a quarter of a second of each.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import cast

from headrace import settings
from headrace.cli.imports import collector_off
from headrace.errors import ConfigError
from headrace.settings import ServeArgs


class Role(Enum):
    """What `headrace serve` can run."""

    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"
    HYBRID = "hybrid"
    KVSTORE = "kvstore"
    INGESTOR = "ingestor"


ROOTS = {
    Role.ROUTER: "headrace.router.__main__:run",
    Role.PREFILL: "headrace.cli.begin_worker:run",
    Role.DECODE: "headrace.cli.begin_worker:run",
    Role.HYBRID: "headrace.cli.begin_worker:run",
    Role.KVSTORE: "headrace.kvstore.__main__:run",
    Role.INGESTOR: "headrace.ingestor.__main__:run",
}
"""Composition root of each role: `run(args: ServeArgs) -> int`."""

WORKERS = (Role.PREFILL, Role.DECODE, Role.HYBRID)

GRPC_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
"""What services ask of gRPC, which reads it when it is imported: the thread that waits for messages reads the sockets
too. With the event engine two to three more threads wake for each message, which cost the router 0.15 ms per token
(grpcio 1.85, 2026-11). A gRPC that does not know the names says so once and goes on."""


def serve(
    role: Role, *, file: Path | None, assignments: Sequence[str], dtype: str | None = None, print_config: bool = False
) -> int:
    """Run a service until SIGTERM; return its exit code.

    Args:
        role: What to run.
        file: YAML file with a section per role.
        assignments: Values of `--set`.
        dtype: Precision of a worker, like `--set dtype=`.
        print_config: Show the resolved configuration and leave.

    Raises:
        ConfigError: a setting is wrong.
    """
    settings.prefer("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)
    overrides = {"role": role.value} if role in WORKERS else {}
    overrides |= settings.parse_assignments(assignments)
    if dtype is not None:
        overrides["dtype"] = dtype
    args = ServeArgs(file=file, overrides=overrides, env=settings.environment(), print_config=print_config)
    module, _, name = ROOTS[role].partition(":")
    with collector_off():
        run = cast(Callable[[ServeArgs], int], getattr(importlib.import_module(module), name))
    return run(args)


def main() -> int:
    """Run what a supervisor asks for; return the exit code, 2 for bad settings."""
    parser = argparse.ArgumentParser("headrace serve", description="Run one service until SIGTERM.", allow_abbrev=False)
    parser.add_argument("role", type=Role)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--print-config", action="store_true")
    options = parser.parse_args()
    try:
        return serve(options.role, file=options.config, assignments=options.set, print_config=options.print_config)
    except ConfigError as error:
        sys.stderr.write(f"headrace: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
