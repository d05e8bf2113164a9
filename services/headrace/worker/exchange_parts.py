"""What fetching and storing blocks have in common."""

import asyncio
from dataclasses import dataclass

from headrace.core.cost import CostModel
from headrace.core.request import SequenceSpec
from headrace.worker.digests import BlockDigests
from headrace.worker.engine import AsyncEngine
from headrace.worker.pool_link import LinkParts


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeParts:
    """What an exchange works with.

    Attributes:
        engine: Owner of the local blocks.
        tasks: Outlives every request.
        links: Ways to other processes; knows the transport, the clock and the layout.
        digests: Of own blocks.
    """

    engine: AsyncEngine
    tasks: asyncio.TaskGroup
    links: LinkParts
    digests: BlockDigests


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeConfig:
    """How an exchange works.

    Attributes:
        stores: host:port of the kvstores; none runs without.
        deadline_s: Longest time for one fetch, and for one put as far as it is not made to wait.
        cost: What steps cost; without it everything that can be fetched is.
        chunk_tokens: Most tokens of a step; None computes a prompt in one.
        early_start: Whether a prompt may start with the first layers of its fetched blocks.
        stores_blocks: Whether full blocks are put into the kvstores.
        store_bytes_per_s: Rate of puts while the engine works; None takes a share of what the lane gives.
    """

    stores: tuple[str, ...] = ()
    deadline_s: float
    cost: CostModel | None = None
    chunk_tokens: int | None = None
    early_start: bool = True
    stores_blocks: bool = True
    store_bytes_per_s: float | None = None


def owner_of(spec: SequenceSpec) -> str:
    """Return whose the blocks of a sequence are, as pools know them: nobody's if they are under the public root."""
    return spec.tenant if spec.cache_key else ""
