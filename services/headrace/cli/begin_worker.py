"""The first steps of a worker: what needs no torch goes on while torch is imported, which takes two seconds."""

import logging
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor

from headrace.cli.imports import collector_off
from headrace.runtime.heap import share_one_heap
from headrace.runtime.lifecycle import Lifecycle, run_service
from headrace.runtime.logs import setup_logs
from headrace.settings import ServeArgs
from headrace.transfer.agent import Transport, load_bindings
from headrace.worker.config import WorkerConfig

logger = logging.getLogger(__name__)


def run(args: ServeArgs) -> int:
    """Serve until SIGTERM; returns the exit code."""
    loaded = args.load(WorkerConfig, "worker")
    if args.print_config:
        sys.stdout.write(loaded.describe() + "\n")
        return 0
    share_one_heap()
    config = loaded.value
    setup_logs(sys.stderr, name=config.name, role=config.role.value)
    logger.info("configuration", extra={"settings": loaded.describe()})
    epoch = secrets.token_hex(8)

    load_bindings()  # Not in the thread: modules that two threads import may be met half made.
    with ThreadPoolExecutor(1) as thread:
        transport = thread.submit(Transport, f"{config.name}-{epoch}")
        with collector_off():
            from headrace.cli.worker import serve

    async def main(lifecycle: Lifecycle) -> None:
        await serve(config, lifecycle, transport.result(), epoch)

    return run_service(main, exit_with_parent=config.exit_with_parent)
