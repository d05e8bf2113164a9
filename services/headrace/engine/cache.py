"""The engine's blocks: leases of sequences, and the prefixes that stay behind."""

from headrace.core.block import BlockHash, BlockId, block_hashes, blocks_for
from headrace.core.chained_block import ChainedBlock
from headrace.core.ledger import BlockLedger, LedgerCounts
from headrace.engine.messages import CacheChange
from headrace.engine.sequence import Sequence


class BlockCache:
    """Hands blocks to sequences and names them when they are full, so that others find them.

    A full block is found by the chained hash of everything up to its end; partial blocks are never shared.
    The last known token is never taken from the cache: its logits choose the next one.

    Args:
        num_blocks: Size of the pool.
        block_tokens: Tokens per block.
        describes_stored: Whether changes carry the tokens of stored blocks, for readers with other hashes.
    """

    def __init__(self, num_blocks: int, block_tokens: int, *, describes_stored: bool = False) -> None:
        self.ledger = BlockLedger(num_blocks)
        self.block_tokens = block_tokens
        self._stored: dict[BlockHash, bool] = {}
        self._described: dict[BlockHash, ChainedBlock] | None = {} if describes_stored else None

    def counts(self) -> LedgerCounts:
        """Return the state of the pool."""
        return self.ledger.counts()

    def usable_hashes(self, sequence: Sequence) -> list[BlockHash]:
        """Return the names of the full blocks before the last known token."""
        self._hash_full_blocks(sequence)
        return sequence.hashes[: max(0, len(sequence.tokens) - 1) // self.block_tokens]

    def match(self, sequence: Sequence) -> tuple[BlockId, ...]:
        """Return the blocks of the longest reusable prefix of a sequence's known tokens."""
        return self.ledger.match(self.usable_hashes(sequence))

    def admission_cost(self, sequence: Sequence, matched: tuple[BlockId, ...]) -> int:
        """Return how many available blocks an admission takes: new ones, and cached ones that it revives."""
        revived = sum(self.ledger.is_cached(block) for block in matched)
        return blocks_for(len(sequence.tokens), self.block_tokens) - len(matched) + revived

    def share(self, sequence: Sequence) -> None:
        """Lease the longest reusable prefix, maybe no block; sets the KV that is present.

        All admissions of a step share before any block of the step is taken: taking one may forget a cached
        block, and with it the rest of a prefix that the plan had counted on.
        """
        owner = sequence.spec.sequence_id
        blocks = self.ledger.lease(sequence.lease_id, 0, shared=self.match(sequence), owner=owner)
        sequence.blocks = list(blocks)
        sequence.num_named = len(blocks)
        sequence.place(len(blocks) * self.block_tokens)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Make the table hold `num_tokens`."""
        missing = blocks_for(num_tokens, self.block_tokens) - len(sequence.blocks)
        if missing > 0:
            sequence.blocks.extend(self.ledger.extend(sequence.lease_id, missing))

    def truncate(self, sequence: Sequence, num_kept: int) -> None:
        """Let go of everything behind the first `num_kept` tokens.

        A shared block in which they end goes as a whole: who shares it needs the rest of it.
        """
        size = self.block_tokens
        present = min(sequence.kv_length, num_kept)
        if present % size and not self.ledger.may_change(sequence.blocks[present // size]):
            present -= present % size
        sequence.num_named = min(sequence.num_named, present // size)
        del sequence.hashes[num_kept // size :]
        self._shrink(sequence, blocks_for(present, size))
        sequence.place(present)

    def share_more(self, sequence: Sequence) -> None:
        """Take blocks that follow the present KV from the cache: a prompt may grow by what others have computed."""
        first = sequence.kv_length // self.block_tokens
        found = self.ledger.match(self.usable_hashes(sequence)[first:])
        if found:
            # The KV of a block that was begun is cheaper to have from there than to complete here.
            self._shrink(sequence, first)
            self.ledger.share(sequence.lease_id, found)
            sequence.blocks.extend(found)
            # They have their names, or had them when they were found: to give one again may be wrong by now.
            sequence.num_named = first + len(found)
            sequence.place(sequence.num_named * self.block_tokens)

    def name_full_blocks(self, sequence: Sequence) -> None:
        """Name the blocks that computed tokens have filled since the last call, but none that may still change."""
        num_settled = min(sequence.kv_length, sequence.num_final) if sequence.is_open else sequence.kv_length
        num_full = num_settled // self.block_tokens
        if num_full <= sequence.num_named:
            return
        self._hash_full_blocks(sequence)
        for index in range(sequence.num_named, num_full):
            block_hash = sequence.hashes[index]
            is_new = self.ledger.lookup(block_hash) is None
            if self.ledger.name(sequence.blocks[index], block_hash) and is_new:
                self._stored[block_hash] = index >= len(sequence.spec.tokens) // self.block_tokens
                if self._described is not None:
                    self._described[block_hash] = self._describe(sequence, index)
        sequence.num_named = num_full

    def trim(self, sequence: Sequence) -> None:
        """Let go of blocks behind the known tokens."""
        self._shrink(sequence, blocks_for(len(sequence.tokens), self.block_tokens))

    def exclusive(self, sequence: Sequence, *, after_writers: bool = False) -> frozenset[BlockId]:
        """Return the blocks that a sequence's eviction makes available; see `BlockLedger.exclusive`."""
        return self.ledger.exclusive(sequence.lease_id, after_writers=after_writers)

    def release(self, sequence: Sequence) -> None:
        """End a sequence's lease; its named blocks stay until they are needed."""
        self.ledger.release(sequence.lease_id)

    def take_change(self) -> CacheChange | None:
        """Return what came into and left the cache since the last call, or None."""
        evicted, named = self.ledger.take_evicted(), self._stored
        if not evicted and not named:
            return None
        self._stored = {}
        # A block may have come and gone, or gone and come back, since the last call: what is true now counts.
        stored = tuple(block for block in named if self.ledger.lookup(block) is not None)
        decoded = tuple(block for block in stored if named[block])
        removed = tuple(block for block in dict.fromkeys(evicted) if self.ledger.lookup(block) is None)
        if self._described is None:
            return CacheChange(stored=stored, decoded=decoded, removed=removed)
        described = tuple(self._described[block] for block in stored)
        self._described.clear()
        return CacheChange(stored=stored, decoded=decoded, removed=removed, described=described)

    def _shrink(self, sequence: Sequence, num_blocks: int) -> None:
        if len(sequence.blocks) > num_blocks:
            del sequence.blocks[num_blocks:]
            self.ledger.shrink(sequence.lease_id, num_blocks)

    def _describe(self, sequence: Sequence, index: int) -> ChainedBlock:
        return ChainedBlock(
            block_hash=sequence.hashes[index],
            parent=sequence.hashes[index - 1] if index else sequence.root,
            root=sequence.root,
            tokens=tuple(sequence.tokens[index * self.block_tokens : (index + 1) * self.block_tokens]),
        )

    def _hash_full_blocks(self, sequence: Sequence) -> None:
        parent = sequence.hashes[-1] if sequence.hashes else sequence.root
        fresh = sequence.tokens[len(sequence.hashes) * self.block_tokens :]
        sequence.hashes.extend(block_hashes(parent, fresh, self.block_tokens))
