"""What the router's copy of the index says of a prompt: a hint, from memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.core.block import BlockHash
from headrace.core.placement import Tier, is_foreign
from headrace.core.request import CachedPrefix
from headrace.core.segments import segments, store_of
from headrace.index.prefix_index import PrefixIndex, PrefixMatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Cached:
    """Who holds how much of a prompt.

    Attributes:
        by_worker: Leading blocks in each worker's own cache, by name; those with none are left out.
        num_stored: Leading blocks that the kvstores hold between them.
        sources: Where blocks can be fetched.
    """

    by_worker: Mapping[str, int] = field(default_factory=dict)
    num_stored: int = 0
    sources: tuple[CachedPrefix, ...] = ()

    @property
    def num_reachable(self) -> int:
        """Leading blocks that any worker can have without computing them."""
        return max(self.num_stored, *self.by_worker.values(), 0)


NOTHING_CACHED = Cached()


class Prefixes:
    """Asks a copy of the index about the processes that answer now.

    Args:
        index: The copy.
        is_current: Returns whether the copy follows the log now; while it does not, nobody is to blame for its errors.
    """

    def __init__(self, index: PrefixIndex, is_current: Callable[[], bool] = lambda: True) -> None:
        self._index = index
        self.is_current = is_current

    def look_up(self, hashes: Sequence[BlockHash], workers: Mapping[str, str], stores: Mapping[str, str]) -> Cached:
        """Return who holds how much of a prompt.

        Args:
            hashes: Of its full blocks, in order.
            workers: host:port of usable workers, by name.
            stores: host:port of usable kvstores, by name.

        What foreign engines hold is no hit of anybody: it cannot be read, not even by a process that took such a name.
        """
        workers, stores = _readable(workers), _readable(stores)
        if not hashes:
            return NOTHING_CACHED
        found = {match.location: match for match in self._index.match(hashes)}
        own = {name: found[name] for name in workers if name in found}
        num_stored = self._index.pooled(hashes, stores.keys()) if stores else 0
        peers = (_source(match, workers[name], 0, match.num_blocks) for name, match in own.items())
        return Cached(
            by_worker={name: match.num_blocks for name, match in own.items()},
            num_stored=num_stored,
            sources=(*peers, *self._stored(hashes[:num_stored], stores, found)),
        )

    def _stored(
        self, hashes: Sequence[BlockHash], stores: Mapping[str, str], found: Mapping[str, PrefixMatch]
    ) -> Iterable[CachedPrefix]:
        """Return which store is to be asked for which blocks."""
        if not hashes:
            return ()
        if len(stores) == 1:
            ((name, address),) = stores.items()
            return (_source(found[name], address, 0, len(hashes)),)
        return tuple(self._by_segment(hashes, stores))

    def _by_segment(self, hashes: Sequence[BlockHash], stores: Mapping[str, str]) -> Iterator[CachedPrefix]:
        """Return where each segment is to be found; what lies elsewhere, because stores came or left, is not named."""
        names = {address: name for name, address in stores.items()}
        for segment in segments(hashes):
            address = store_of(segment.key, tuple(names))
            part = {match.location: match for match in self._index.match(hashes[segment.start : segment.end])}
            match = part.get(names[address])
            if match is not None:
                yield _source(match, address, segment.start, segment.start + match.num_blocks)


def _readable(addresses: Mapping[str, str]) -> Mapping[str, str]:
    return {name: address for name, address in addresses.items() if not is_foreign(name)}


def _source(match: PrefixMatch, address: str, start: int, end: int) -> CachedPrefix:
    tier = max((tier for tier, _, _ in match.counts), default=Tier.DRAM)
    return CachedPrefix(location=match.location, address=address, tier=tier, start=start, end=end)
