"""Measure the lane to a peer with real blocks."""

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from headrace.clock import Clock
from headrace.transfer.connector import Connector

NUM_SCRATCH_BLOCKS = 8
"""Blocks at the end of every arena that no pool hands out: what measurements read and overwrite."""

NUM_BANDWIDTH_ROUNDS = 8
NUM_LATENCY_ROUNDS = 64
TRANSFER_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one pair of processes can move.

    Attributes:
        lane: Transport of the payload, for example "cma" or "tcp".
        write_bytes_per_s: Best of several rounds over all scratch blocks.
        read_bytes_per_s: As above.
        latency_us: Median of a one-block read, from call to return on the event loop.
    """

    lane: str
    write_bytes_per_s: float
    read_bytes_per_s: float
    latency_us: float


async def measure(
    connector: Connector, agent_name: str, local_ids: Sequence[int], remote_ids: Sequence[int], clock: Clock
) -> Measurement:
    """Move scratch blocks to and from a connected peer; their content is lost on both sides.

    Args:
        connector: Connected to the peer.
        agent_name: The peer.
        local_ids: Own blocks that hold nothing, at least one.
        remote_ids: As many blocks of the peer that hold nothing.
        clock: The connector's clock.

    Raises:
        PeerFailed: the peer went away.
        DeadlineExceeded: one transfer took longer than 5 s.
    """
    num_bytes = len(local_ids) * connector.pool.block_bytes
    await connector.read(
        agent_name, local_ids[:1], remote_ids[:1], clock.now() + TRANSFER_LIMIT_S
    )  # The first one wires up.

    async def seconds(move: Callable[[str, Sequence[int], Sequence[int], float], Awaitable[None]], num: int) -> float:
        begun_s = clock.now()
        await move(agent_name, local_ids[:num], remote_ids[:num], begun_s + TRANSFER_LIMIT_S)
        return clock.now() - begun_s

    writes = [await seconds(connector.write, len(local_ids)) for _ in range(NUM_BANDWIDTH_ROUNDS)]
    reads = [await seconds(connector.read, len(local_ids)) for _ in range(NUM_BANDWIDTH_ROUNDS)]
    singles = [await seconds(connector.read, 1) for _ in range(NUM_LATENCY_ROUNDS)]
    return Measurement(
        lane=await connector.lane(agent_name),
        write_bytes_per_s=num_bytes / max(min(writes), 1e-9),
        read_bytes_per_s=num_bytes / max(min(reads), 1e-9),
        latency_us=statistics.median(singles) * 1e6,
    )
