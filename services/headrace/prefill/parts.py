"""What the prefill jobs of a worker share."""

import asyncio
from dataclasses import dataclass

from headrace.clock import Clock
from headrace.runtime.channels import Channels
from headrace.transfer.connector import Connector
from headrace.worker.blocks import BlockExchange
from headrace.worker.engine import AsyncEngine
from headrace.worker.lifetimes import Lifetimes
from headrace.worker.peers import Peers


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillParts:
    """What every prefill job of a worker shares.

    Attributes:
        lifetimes: Tells whether a decode worker is gone.
        tasks: Outlives every request.
        address: host:port of this worker's own gRPC server.
        epoch: Lifetime of this process.
        transfer_deadline_s: Longest time for one push.
        push_whole: Push once after the whole prompt; the baseline of a benchmark.
        block_bytes: Size of a block.
    """

    engine: AsyncEngine
    connector: Connector
    peers: Peers
    channels: Channels
    blocks: BlockExchange
    clock: Clock
    lifetimes: Lifetimes
    tasks: asyncio.TaskGroup
    address: str
    epoch: str
    block_tokens: int
    block_bytes: int
    transfer_deadline_s: float
    push_whole: bool
