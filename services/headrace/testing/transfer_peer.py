"""A process that owns a pool and answers on its standard input: the other side of transfer tests.

Run as `python -m headrace.testing.transfer_peer NUM_BLOCKS BLOCK_BYTES`. It prints one JSON line about its
pool, then answers `fill BLOCK BYTE` with "ok" and `sum BLOCK` with the block's digest, until its input ends.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping

import blake3

from headrace.clock import WallClock
from headrace.transfer.agent import Transport
from headrace.transfer.arena import arena_of, map_blocks
from headrace.transfer.connector import PoolDescriptor
from headrace.transfer.nixl import NixlConnector


class TransferPeer:
    """Starts such a process and speaks to it; a context manager that ends it.

    Args:
        num_blocks: Size of its pool.
        block_bytes: Size of a block.
        env: Further environment variables.
    """

    def __init__(self, num_blocks: int, block_bytes: int, env: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "headrace.testing.transfer_peer", str(num_blocks), str(block_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        found = json.loads(self._answer())
        self.pool = PoolDescriptor(**{**found, "agent_metadata": bytes.fromhex(found["agent_metadata"])})

    def __enter__(self) -> "TransferPeer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def fill(self, block: int, byte: int) -> None:
        """Fill a block with one byte."""
        self._ask(f"fill {block} {byte}")

    def digest(self, block: int) -> str:
        """Return the digest of a block, as `digest_of` makes it."""
        return self._ask(f"sum {block}")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; SIGSTOP returns when all threads of the process have stopped."""
        self._process.send_signal(number)
        if number is signal.SIGSTOP:
            os.waitpid(self._process.pid, os.WUNTRACED)

    def _ask(self, line: str) -> str:
        if self._process.stdin is None:
            raise RuntimeError("the peer has no input")
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise RuntimeError(f"the peer ended with {self._process.wait()}")
        return line.strip()


def digest_of(content: bytes) -> str:
    """Return the digest that peers answer with."""
    return blake3.blake3(content).hexdigest()


def main(num_blocks: int, block_bytes: int) -> None:
    """Serve one pool until the input ends."""
    blocks = map_blocks(num_blocks, block_bytes)
    transport = Transport(f"peer-{os.getpid()}-{os.urandom(4).hex()}")
    connector = NixlConnector(transport, arena_of(blocks), "peer", WallClock())
    pool = connector.pool
    described = {name: getattr(pool, name) for name in PoolDescriptor.__dataclass_fields__}
    _say(json.dumps({**described, "agent_metadata": pool.agent_metadata.hex()}))
    for line in sys.stdin:
        match line.split():
            case ["fill", block, byte]:
                blocks[int(block)] = int(byte)
                _say("ok")
            case ["sum", block]:
                _say(digest_of(blocks[int(block)].tobytes()))
            case _:
                _say("unknown")
    asyncio.run(connector.close())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
