"""A worker's dealings with blocks elsewhere: fetched before a sequence starts, stored after it ends."""

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.core.block import BlockHash, block_hashes, root_hash
from headrace.core.placement import Tier
from headrace.core.request import SequenceSpec
from headrace.worker.engine import OpenSequence
from headrace.worker.exchange_parts import ExchangeConfig, ExchangeParts, owner_of
from headrace.worker.fetching import Fetcher
from headrace.worker.pools import Pools
from headrace.worker.storing import Chain, Storer


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """What prompts found, and what choosing that cost; all since the start.

    Attributes:
        local_tokens: Found in the own cache.
        fetched_tokens: Read from elsewhere, by where they were.
        declined_tokens: That somebody held and that were computed, for that was faster.
        num_regretted: Fetches that took longer than computing would have.
        regretted_s: By how much, together.
        num_corrupt_blocks: Fetched blocks whose bytes differed from their digest.
        num_stored_blocks: Blocks put into kvstores.
        num_dropped_blocks: Blocks not put because too many waited.
    """

    local_tokens: int
    fetched_tokens: dict[Tier, int]
    declined_tokens: int
    num_regretted: int
    regretted_s: float
    num_corrupt_blocks: int
    num_stored_blocks: int
    num_dropped_blocks: int


class BlockExchange:
    """Fetches and stores blocks of sequences; failures elsewhere are misses, never errors here.

    Args:
        parts: What it works with.
        config: How.

    Attributes:
        fetcher: Fetches.
        storer: Stores.
    """

    def __init__(self, parts: ExchangeParts, config: ExchangeConfig) -> None:
        pools = Pools(parts.links, parts.digests, config.stores)
        self.fetcher = Fetcher(parts, config, pools)
        self.storer = Storer(parts, config, pools)
        self._digests = parts.digests
        self._caller = parts.links.caller

    def hashes(self, tokens: Sequence[int], cache_key: bytes) -> tuple[BlockHash, ...]:
        """Return the hashes of the full blocks of `tokens`."""
        root = root_hash(self._caller.fingerprint, cache_key)
        return block_hashes(root, tokens, self._caller.layout.block_tokens)

    async def fetch(self, sequence: OpenSequence) -> int:
        """Fill a sequence's blocks after the local hit; see `Fetcher.fetch`."""
        return await self.fetcher.fetch(sequence)

    def store_later(self, spec: SequenceSpec, hashes: tuple[BlockHash, ...]) -> None:
        """Queue the full blocks of a sequence for the kvstores.

        Args:
            spec: The sequence: its known tokens were computed as a prompt, all after them decoded.
            hashes: Of its blocks, from the first.
        """
        num_exact = len(spec.tokens) // self._caller.layout.block_tokens
        self.storer.later(Chain(hashes=hashes, num_exact=num_exact, tenant=owner_of(spec)))

    async def run_stores(self) -> None:
        """Put queued blocks until cancelled."""
        await self.storer.run()

    def reuse(self) -> Reuse:
        """Return the counts."""
        totals, size = self.fetcher.totals, self._caller.layout.block_tokens
        return Reuse(
            local_tokens=totals.num_local_blocks * size,
            fetched_tokens={tier: count * size for tier, count in totals.fetches.num_fetched_blocks.items()},
            declined_tokens=totals.fetches.num_declined_blocks * size,
            num_regretted=totals.fetches.num_regretted,
            regretted_s=totals.fetches.regretted_s,
            num_corrupt_blocks=self._digests.num_corrupt,
            num_stored_blocks=self.storer.num_stored_blocks,
            num_dropped_blocks=self.storer.num_dropped_blocks,
        )
