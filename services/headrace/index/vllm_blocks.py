"""What a vLLM engine says it holds, under our names."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from headrace.core.block import BlockHash, chain_hash
from headrace.core.placement import Tier
from headrace.index.events import Change, ChangeKind
from headrace.index.vllm_events import TIERS, BlockRemoved, BlockStored, ForeignHash

MAX_GROUPS = 64


@dataclass(slots=True, kw_only=True)
class _Held:
    """A foreign block: our hashes of its tokens, and one bit for each tier that holds it."""

    hashes: tuple[BlockHash, ...]
    tiers: int = 0


class ForeignBlocks:
    """Names the blocks of one engine as we would, by hashing their tokens again.

    Its own hashes are only keys here. Blocks that tokens alone do not name (adapters, salts, media), that keep
    only a window, or that follow a block never heard of are left out: the index may know too little, never too much.

    Attributes:
        num_orphans: Blocks left out because their parent is unknown.
        num_unsupported: Blocks left out for what they are.
        num_refused: Blocks left out because `max_blocks` are known.

    Args:
        root: Parent of every first block.
        block_tokens: Our tokens per block; a foreign block holds this many or a multiple.
        max_blocks: Most blocks of ours that the foreign ones may come to: one of those can be of any size.
    """

    def __init__(self, root: BlockHash, block_tokens: int, max_blocks: int = 262_144) -> None:
        self._root = root
        self._block_tokens = block_tokens
        self._max_blocks = max_blocks
        self._held: dict[ForeignHash, _Held] = {}
        self._num_hashes = 0
        self._skipped_groups: set[int] = set()
        self.num_orphans = 0
        self.num_unsupported = 0
        self.num_refused = 0

    def __len__(self) -> int:
        """Return how many blocks of ours are known to be held."""
        return self._num_hashes

    def clear(self) -> None:
        """Forget all blocks."""
        self._held.clear()
        self._num_hashes = 0
        self._skipped_groups.clear()

    def store(self, event: BlockStored) -> Change | None:
        """Return what a stored event adds, or None."""
        tier = TIERS.get(event.medium)
        if tier is None or not self._is_supported(event):
            self.num_unsupported += len(event.block_hashes)
            return None
        added: list[_Held] = []
        for held in self._resolve(event):
            if not held.tiers & _bit(tier):
                held.tiers |= _bit(tier)
                added.append(held)
        return _change(ChangeKind.STORED, tier, added)

    def remove(self, event: BlockRemoved) -> Change | None:
        """Return what a removed event takes away, or None."""
        tier = TIERS.get(event.medium)
        if tier is None or event.group_idx in self._skipped_groups:
            return None
        gone: list[_Held] = []
        for name in event.block_hashes:
            held = self._held.get(name)
            if held is None or not held.tiers & _bit(tier):
                continue
            held.tiers &= ~_bit(tier)
            gone.append(held)
            if not held.tiers:
                del self._held[name]
                self._num_hashes -= len(held.hashes)
        return _change(ChangeKind.REMOVED, tier, gone)

    def _is_supported(self, event: BlockStored) -> bool:
        if not event.has_whole_context:
            if event.group_idx is not None and len(self._skipped_groups) < MAX_GROUPS:
                self._skipped_groups.add(event.group_idx)
            return False
        if event.locality == "REMOTE" or not event.is_plain:
            return False
        size = event.block_size
        is_filled = len(event.token_ids) == size * len(event.block_hashes)
        return not event.token_ids or (is_filled and size % self._block_tokens == 0)

    def _resolve(self, event: BlockStored) -> Iterator[_Held]:
        """Yield the blocks of an event as far as they can be named, remembering new ones."""
        parent = self._parent(event.parent_block_hash)
        for index, name in enumerate(event.block_hashes):
            held = self._held.get(name)
            if held is None:
                if parent is None or not event.token_ids:
                    self.num_orphans += len(event.block_hashes) - index
                    return
                num_hashes = self._num_hashes + event.block_size // self._block_tokens
                if num_hashes > self._max_blocks:
                    self.num_refused += len(event.block_hashes) - index
                    return
                self._num_hashes = num_hashes
                tokens = event.token_ids[index * event.block_size : (index + 1) * event.block_size]
                held = self._held[name] = _Held(hashes=tuple(self._chain(parent, tokens)))
            parent = held.hashes[-1]
            yield held

    def _parent(self, name: ForeignHash | None) -> BlockHash | None:
        if name is None:
            return self._root
        held = self._held.get(name)
        return held.hashes[-1] if held else None

    def _chain(self, parent: BlockHash, tokens: Sequence[int]) -> Iterator[BlockHash]:
        for start in range(0, len(tokens), self._block_tokens):
            parent = chain_hash(parent, tokens[start : start + self._block_tokens])
            yield parent


def _bit(tier: Tier) -> int:
    return 1 << tier


def _change(kind: ChangeKind, tier: Tier, blocks: Iterable[_Held]) -> Change | None:
    hashes = tuple(block_hash for held in blocks for block_hash in held.hashes)
    return Change(kind=kind, tier=tier, hashes=hashes) if hashes else None
