"""Find out which transport UCX chooses to a peer.

UCX tells nobody but its own log. So a child process with that log switched on connects to the peer as this
process did, reads one block, and the table that UCX prints is read. Run as `python -m headrace.transfer.lane`
it is that child; it gets the peer's TransferPool on its standard input.
"""

import asyncio
import re
import subprocess
import sys
import time

from headrace.errors import PeerFailed
from headrace.settings import environment
from headrace.transfer.agent import NixlAgent, Operation, Transport
from headrace.transfer.arena import arena_of, map_blocks
from headrace.transfer.connector import PoolDescriptor
from headrace.transfer.wire import pool_from_proto, pool_to_proto
from headrace.v1 import block_pb2

PROBE_TIMEOUT_S = 15.0
READ_TIMEOUT_S = 5.0

_READ_TABLE = re.compile(
    r"remote memory read by ucp_get\S* into host memory.*?\n(.*?)(?=remote memory|active message|\Z)", re.S
)
_TRANSPORT = re.compile(r"\b([a-z][a-z0-9_]*)/[a-z0-9_:.]+")


async def probe_lane(pool: PoolDescriptor) -> str:
    """Return the transports of a large read from a pool, for example "cma", or "tcp+ib" where it is striped.

    Raises:
        PeerFailed: the peer did not answer, or UCX printed something unknown.
    """
    try:
        # Not asyncio's own: uvloop forks, and the fork handlers of gRPC's threads crash the child now and then.
        child = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "headrace.transfer.lane"],
            input=pool_to_proto(pool).SerializeToString(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment(), "UCX_PROTO_INFO": "y"},
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PeerFailed(f"{pool.agent_name} did not answer a read within {PROBE_TIMEOUT_S:g} s") from None
    lane = parse_lane(child.stdout.decode(errors="replace"))
    if lane is None or child.returncode != 0:
        raise PeerFailed(f"no lane to {pool.agent_name}: the test read ended with status {child.returncode}")
    return lane


def parse_lane(output: str) -> str | None:
    """Return the transports in UCX's table of remote reads, sorted and joined by "+"; None without a table."""
    tables = _READ_TABLE.findall(output)
    found = sorted(set(_TRANSPORT.findall(tables[-1]))) if tables else []
    return "+".join(found) or None


def main() -> int:
    """Read the last block of the pool on standard input; return 0 when it arrived."""
    pool = pool_from_proto(block_pb2.TransferPool.FromString(sys.stdin.buffer.read()))
    agent = NixlAgent(Transport(f"lane-probe-{time.time_ns()}"), arena_of(map_blocks(1, pool.block_bytes)))
    blocks = agent.connect(pool)
    request = agent.make(Operation.READ, pool.agent_name, blocks, ([0], [pool.num_blocks - 1]))
    deadline_s = time.monotonic() + READ_TIMEOUT_S
    is_done = agent.post(request, pool.agent_name)
    while not is_done and time.monotonic() < deadline_s:
        time.sleep(0.001)
        is_done = agent.poll(request, pool.agent_name)
    return 0 if is_done else 1


if __name__ == "__main__":
    sys.exit(main())
