"""The lane that plays deaths in other tests leaves nothing behind itself, whenever it is cut."""

import asyncio
import gc
import socket

import pytest

from headrace.testing.lane import FaultyLane


@pytest.mark.parametrize("num_turns", range(5))
async def test_a_connection_that_is_cut_while_it_is_accepted_is_closed(num_turns):
    lane = FaultyLane()
    await lane.open()
    host, _, port = lane.address.rpartition(":")
    with socket.create_connection((host, int(port))) as client:
        client.setblocking(False)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        await lane.cut()
        async with asyncio.timeout(5):
            try:
                assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
            except ConnectionResetError:
                pass
    gc.collect()  # Something that was left open would warn, which fails the test.
