"""The pools of other processes that a worker reads from and writes to, and how fast each of them has been."""

from dataclasses import dataclass, field

from headrace.core.bandwidth import EXPECTED, LaneMeter
from headrace.core.block import BlockHash
from headrace.core.placement import Tier
from headrace.core.segments import stores_by_preference
from headrace.worker.digests import BlockDigests
from headrace.worker.kv_client import KvClient
from headrace.worker.pool_link import LinkParts, PoolLink
from headrace.worker.pool_reader import PoolReader

MAX_PEERS = 256
"""Other workers that are remembered; those that nobody has read from for longest are forgotten first."""


@dataclass(slots=True, kw_only=True)
class Pool:
    """One address to read from.

    Attributes:
        reader: Reads.
        epoch: Lifetime of its process, as far as is known.
        meters: What was learnt of its tiers in that lifetime.
    """

    reader: PoolReader
    epoch: str = ""
    meters: dict[Tier, LaneMeter] = field(default_factory=dict)

    def meter(self, tier: Tier) -> LaneMeter:
        """Return what measures the lane from a tier to here."""
        return self.meters.setdefault(tier, LaneMeter(EXPECTED[tier]))

    def note_epoch(self, epoch: str) -> None:
        """Forget what was measured of an earlier lifetime: it may have run elsewhere."""
        if self.epoch not in ("", epoch):
            self.meters.clear()
        self.epoch = epoch


class Pools:
    """All of them by address.

    Args:
        parts: What all links share.
        digests: Of own blocks.
        stores: host:port of the kvstores.
    """

    def __init__(self, parts: LinkParts, digests: BlockDigests, stores: tuple[str, ...] = ()) -> None:
        self._parts = parts
        self._digests = digests
        self._stores = {address: KvClient(PoolLink(address, parts), digests) for address in stores}
        self._store_pools = {address: Pool(reader=store.reader) for address, store in self._stores.items()}
        self._peers: dict[str, Pool] = {}

    @property
    def stores(self) -> tuple[KvClient, ...]:
        """All kvstores."""
        return tuple(self._stores.values())

    def stores_for(self, key: BlockHash) -> tuple[KvClient, ...]:
        """Return the kvstores that do not rest after a failure, the one that keeps a segment first.

        Args:
            key: Of the segment.
        """
        ordered = (self._stores[address] for address in stores_by_preference(key, self._stores))
        return tuple(store for store in ordered if not store.link.is_resting)

    def pool(self, address: str) -> Pool:
        """Return the pool at an address."""
        known = self._store_pools.get(address) or self._peers.pop(address, None)
        pool = known or Pool(reader=PoolReader(PoolLink(address, self._parts), self._digests))
        if address not in self._stores:
            self._peers[address] = pool
            while len(self._peers) > MAX_PEERS:
                del self._peers[next(iter(self._peers))]
        return pool
