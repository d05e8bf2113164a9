"""A process that puts blocks into a kvstore step by step: to be stopped between two of them.

Run as `python -m headrace.testing.store_writer ADDRESS` it answers lines of its input until that ends, with the code
of an error where one happens: `reserve LEASE_S NUMBER...` and, for reading, `acquire LEASE_S NUMBER...` with the
numbers of the store's blocks, `write PATIENCE_S` and `commit` with "ok". It gives up writing PATIENCE_S after the
end of the lease.
"""

import asyncio
import secrets
import sys

from headrace.clock import WallClock
from headrace.core.block import KvLayout
from headrace.errors import HeadraceError
from headrace.runtime.channels import Channels
from headrace.testing.kvstore import StoreClient
from headrace.transfer.agent import Transport
from headrace.transfer.arena import arena_of, map_blocks
from headrace.transfer.nixl import NixlConnector
from headrace.v1 import block_pb2

LAYOUT = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=64, dtype="fp32")
NUM_BLOCKS = 16
FILL = 0xEE
"""Every byte that it writes."""


def name_of(number: int) -> bytes:
    """Return the hash that stands for a number."""
    return number.to_bytes(16, "little")


class _Writer:
    def __init__(self, client: StoreClient, clock: WallClock) -> None:
        self._client = client
        self._clock = clock
        self._lease = block_pb2.BlockLease()
        self._end_s = 0.0

    async def answer(self, line: str) -> str:
        try:
            return await self._do(line.split())
        except HeadraceError as error:
            return error.code

    async def _do(self, words: list[str]) -> str:
        match words:
            case ["reserve", lease_s, *numbers]:
                self._end_s = self._clock.now() + float(lease_s)
                names = [name_of(int(number)) for number in numbers]
                self._lease = (await self._client.reserve(names, lease_s=float(lease_s))).lease
                return " ".join(map(str, self._lease.block_ids))
            case ["acquire", lease_s, *numbers]:
                names = [name_of(int(number)) for number in numbers]
                self._lease = await self._client.acquire(names, lease_s=float(lease_s))
                return " ".join(map(str, self._lease.block_ids))
            case ["write", patience_s]:
                local_ids = range(len(self._lease.block_ids))
                await self._client.write(self._lease, local_ids, self._end_s + float(patience_s))
            case ["commit"]:
                await self._client.commit(self._lease)
            case _:
                return "unknown"
        return "ok"


async def main(address: str) -> None:
    """Answer until the input ends."""
    clock, memory = WallClock(), map_blocks(NUM_BLOCKS, LAYOUT.block_bytes)
    memory[:] = FILL
    agent = f"writer-{secrets.token_hex(4)}"
    connector = NixlConnector(Transport(agent, is_passive=False), arena_of(memory), agent, clock)
    try:
        async with Channels() as channels:
            writer = _Writer(StoreClient(address, channels, connector, memory, LAYOUT, clock), clock)
            while line := await asyncio.to_thread(sys.stdin.readline):
                sys.stdout.write(await writer.answer(line) + "\n")
                sys.stdout.flush()
    finally:
        await connector.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
