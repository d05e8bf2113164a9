"""What a process says it holds."""

import asyncio
import os

from headrace.runtime.footprint import num_fds, num_tasks


async def test_process_facts_move_with_tasks_and_files():
    tasks, fds = num_tasks(), num_fds()
    waiting = asyncio.ensure_future(asyncio.Event().wait())
    with open(os.devnull) as _:  # noqa: ASYNC230 an open file is what is counted
        assert num_fds() == fds + 1
    assert num_tasks() == tasks + 1
    waiting.cancel()
