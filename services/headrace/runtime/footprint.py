"""What a process holds, for its load report; apart from metrics, which workers leave to the router."""

import asyncio

import psutil

# Kept: making one reads and parses what the kernel says of the process.
_OWN_PROCESS = psutil.Process()


def num_tasks() -> int:
    """Return the live tasks of the running event loop."""
    return len(asyncio.all_tasks())


def num_fds() -> int:
    """Return the open file descriptors of this process."""
    return _OWN_PROCESS.num_fds()
