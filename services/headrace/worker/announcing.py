"""Tells the rest of the cluster, and others, what this worker's cache holds."""

from collections.abc import Iterable

from headrace.core.block import BlockHash
from headrace.core.placement import EXACT, Origin, Provenance, Tier
from headrace.engine.messages import CacheChange
from headrace.index.events import Change, ChangeKind
from headrace.index.publisher import IndexPublisher
from headrace.index.vllm_publisher import VllmPublisher
from headrace.worker.digests import BlockDigests

_DECODED = Origin(provenance=Provenance.DECODED)


class Announcer:
    """Hands every change of the cache to whoever must hear of it; called on the loop.

    Args:
        digests: Of own blocks.
        index: The global index; None publishes nothing there.
        vllm: Readers of vLLM's events; None publishes nothing for them.
    """

    def __init__(
        self, digests: BlockDigests, index: IndexPublisher | None = None, vllm: VllmPublisher | None = None
    ) -> None:
        self._digests = digests
        self._index = index
        self._vllm = vllm

    def note(self, change: CacheChange) -> None:
        """Tell of a change."""
        self._digests.forget((*change.stored, *change.removed))
        if self._index is not None:
            self._index.note(_changes(change))
        if self._vllm is not None:
            self._vllm.publish(Tier.DEVICE, stored=change.described, removed=change.removed)

    def note_corrupt(self, block_hash: BlockHash) -> None:
        """Tell that a block's bytes are wrong, wherever it is."""
        if self._index is not None:
            self._index.note([Change(kind=ChangeKind.QUARANTINED, tier=Tier.DEVICE, hashes=(block_hash,))])


def _changes(change: CacheChange) -> Iterable[Change]:
    decoded = set(change.decoded)
    groups = (
        (ChangeKind.REMOVED, EXACT, change.removed),
        (ChangeKind.STORED, EXACT, tuple(block for block in change.stored if block not in decoded)),
        (ChangeKind.STORED, _DECODED, change.decoded),
    )
    return [
        Change(kind=kind, tier=Tier.DEVICE, origin=origin, hashes=hashes) for kind, origin, hashes in groups if hashes
    ]
