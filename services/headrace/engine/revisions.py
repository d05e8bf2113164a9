"""Changes of open prompts: what stays of their KV, their blocks and their names."""

import dataclasses
from collections.abc import Sequence as Tokens

from headrace.core.request import Revision
from headrace.engine.cache import BlockCache
from headrace.engine.sequence import Sequence, State
from headrace.engine.swap import HostSwap
from headrace.errors import BlockLost, HeadraceError, InternalError, InvalidRequest


class Revisions:
    """Carries revisions out on sequences and their blocks.

    Args:
        cache: Owner of the blocks.
        swap: Owner of the KV in host memory.
        max_tokens: Tokens that leave no room for an answer.
        vocab_size: Token ids are below it.
    """

    def __init__(self, cache: BlockCache, swap: HostSwap, max_tokens: int, vocab_size: int) -> None:
        self._cache = cache
        self._swap = swap
        self._max_tokens = max_tokens
        self._vocab_size = vocab_size

    def refusal(self, tokens: Tokens[int], field: str, num_before: int = 0) -> HeadraceError | None:
        """Return why tokens cannot follow `num_before` others, or None."""
        num_tokens = num_before + len(tokens)
        if num_tokens >= self._max_tokens:
            return InvalidRequest(
                f"{num_tokens} tokens leave no room for an answer: at most {self._max_tokens} fit here",
                field=field,
                limit=f"{self._max_tokens} tokens",
            )
        # A token id that does not exist would fail the whole step, with all sequences that share it.
        if not all(0 <= token < self._vocab_size for token in tokens):
            limit = f"{self._vocab_size} tokens"
            return InvalidRequest(f"a token id in {field} is not in the vocabulary", field=field, limit=limit)
        return None

    def take(self, sequence: Sequence) -> HeadraceError | None:
        """Carry out what is pending, unless KV is being fetched; return why the sequence cannot go on, or None.

        Between its admission and its begin KV is fetched into its blocks, by the prompt that it was admitted with.
        """
        is_fetched = sequence.state is State.HELD and not sequence.arrives_whole
        while sequence.pending and not is_fetched:
            refusal = self._take(sequence, sequence.pending.pop(0))
            if refusal is not None:
                sequence.pending.clear()
                return refusal
        return None

    def settle(self, sequence: Sequence, num_progress: int) -> None:
        """Take note that nothing reads the blocks of so many Progress events any more."""
        sequence.num_unsettled = max(0, sequence.num_unsettled - num_progress)
        if not sequence.num_unsettled:
            self._release(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Give back what a sequence holds beside its blocks."""
        self._release(sequence)
        if sequence.saved is not None:
            self._swap.drop(sequence.saved)
            sequence.saved = None

    def _take(self, sequence: Sequence, revision: Revision) -> HeadraceError | None:
        num_kept, num_tokens = revision.num_kept, revision.num_kept + len(revision.tokens)
        closes_only = revision.is_closed and not revision.tokens and num_kept == len(sequence.tokens)
        is_next = revision.version == sequence.version + 1 or (closes_only and revision.version == sequence.version)
        if not sequence.is_open or not is_next or num_kept > len(sequence.tokens):
            return InternalError(
                f"revision {revision.version} keeps {num_kept} tokens of version {sequence.version}, which has "
                f"{len(sequence.tokens)} and is {'open' if sequence.is_open else 'closed'}"
            )
        if refusal := self.refusal(revision.tokens, "prompt", num_kept):
            return refusal
        if revision.is_closed and not num_tokens:
            return InvalidRequest("the prompt is empty: give at least one token", field="prompt")
        # There must be a token left to compute when the prompt is closed.
        num_kept = min(num_kept, max(0, num_tokens - 1))
        if sequence.state is State.HELD and num_kept < sequence.kv_length:
            return BlockLost("a revision reaches into blocks that this worker shares: open the sequence anew")
        sequence.take_revision(revision)
        self._adapt(sequence, num_kept)
        return None

    def _adapt(self, sequence: Sequence, num_kept: int) -> None:
        """Make blocks and KV those of the first `num_kept` tokens, or more where others have them."""
        if sequence.state is State.WAITING:
            del sequence.hashes[num_kept // self._cache.block_tokens :]
            if sequence.saved is not None:
                num_saved = min(sequence.saved.num_tokens, num_kept)
                sequence.saved = dataclasses.replace(sequence.saved, num_tokens=num_saved)
            return
        if sequence.state is State.HELD:
            # A peer may be writing into any of its blocks: none is let go, and it hears where the others are.
            del sequence.hashes[num_kept // self._cache.block_tokens :]
            sequence.is_extending = True
            return
        if sequence.num_unsettled:
            self._hold(sequence, num_kept)
        self._cache.truncate(sequence, num_kept)
        self._cache.share_more(sequence)
        self._cache.name_full_blocks(sequence)

    def _hold(self, sequence: Sequence, num_kept: int) -> None:
        """Keep what is behind the kept tokens from being reused while a transfer may read it."""
        blocks = sequence.blocks[num_kept // self._cache.block_tokens :]
        if blocks:
            # Not by the version: a close of which nothing else was left has that of the revision before.
            writer_id = f"{sequence.lease_id} before {len(sequence.stale_writers)}"
            self._cache.ledger.hold(writer_id, blocks)
            sequence.stale_writers.append(writer_id)

    def _release(self, sequence: Sequence) -> None:
        for writer_id in sequence.stale_writers:
            self._cache.ledger.release_writer(writer_id)
        sequence.stale_writers.clear()
