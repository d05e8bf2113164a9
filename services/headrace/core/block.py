"""Blocks of KV cache: their ids, their hashes and their layout."""

import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, NewType

import blake3

BlockId = NewType("BlockId", int)
"""Index of a block in its pool."""

BlockHash = NewType("BlockHash", bytes)
"""16 bytes that name the content of a block: everything from the sequence's start to the block's end."""

HASH_BYTES = 16
_ROOT_TAG = b"headrace-root-2\0"
_LENGTH_BYTES = 4
_TOKEN_BYTES = 4
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


class Span(NamedTuple):
    """Bytes [start, end) of every block of a transfer: some of its layers."""

    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """How a block lies in memory: `[layer, 2, token, kv_head, head_dim]`, contiguous.

    Attributes:
        dtype: "fp32" or "bf16".
    """

    num_layers: int
    block_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        elements = self.num_layers * 2 * self.block_tokens * self.num_kv_heads * self.head_dim
        return elements * _ELEMENT_BYTES[self.dtype]

    def span(self, layers: range) -> Span:
        """Return where neighbouring layers lie in a block."""
        layer_bytes = self.block_bytes // self.num_layers
        return Span(layers.start * layer_bytes, layers.stop * layer_bytes)


def root_hash(model_fingerprint: str, cache_key: bytes = b"") -> BlockHash:
    """Return the parent of every first block of one model and tenant.

    Args:
        model_fingerprint: Digest of weights, dtype, layout and kernels.
        cache_key: What `core.tenancy` made of the tenant; empty is the public root.
    """
    message = _ROOT_TAG + length_prefixed(model_fingerprint.encode()) + length_prefixed(cache_key)
    return BlockHash(blake3.blake3(message).digest(HASH_BYTES))


def chain_hash(parent: BlockHash, tokens: Sequence[int], extras: Sequence[bytes] = ()) -> BlockHash:
    """Return the hash of a full block that follows `parent`; arguments are those of `block_hashes`."""
    return block_hashes(parent, tokens, len(tokens), {0: extras})[0]


def block_hashes(
    parent: BlockHash,
    tokens: Sequence[int],
    block_tokens: int,
    extras: Mapping[int, Sequence[bytes]] = MappingProxyType({}),
) -> tuple[BlockHash, ...]:
    """Return the chained hash of each full block of `tokens`; a partial last block has none.

    docs/block-hash.md states the bytes, for other languages.

    Args:
        parent: Hash of the block before the first, or the root.
        tokens: Token ids below 2^32.
        block_tokens: Tokens per block, at least 1.
        extras: What shapes the KV of a block beside its tokens, in an order that callers agree on: index of the
            block in `tokens` to, for example, digests of its images; an adapter stands in the first block alone,
            for all later ones follow from it.

    Raises:
        OverflowError: a token id is out of range.
    """
    num_blocks, width = len(tokens) // block_tokens, block_tokens * _TOKEN_BYTES
    count, packed = block_tokens.to_bytes(_LENGTH_BYTES, "little"), _packed(tokens)
    bodies = [count + packed[start : start + width] for start in range(0, num_blocks * width, width)]
    for index, items in extras.items():
        if index < num_blocks:
            bodies[index] += b"".join(map(length_prefixed, items))
    # One hasher for all blocks: to make one costs as much as to hash a block with it.
    hasher, hashes = blake3.blake3(), []
    for body in bodies:
        hasher.reset()
        hasher.update(parent + body)
        parent = BlockHash(hasher.digest(HASH_BYTES))
        hashes.append(parent)
    return tuple(hashes)


def length_prefixed(part: bytes) -> bytes:
    """Return bytes behind their number, so that parts in a row can be told apart."""
    return len(part).to_bytes(_LENGTH_BYTES, "little") + part


def _packed(tokens: Sequence[int]) -> bytes:
    """Return each token as 4 bytes, least significant first."""
    # struct.pack, which knows "<", takes twice as long. A C unsigned int has 4 bytes wherever Python runs.
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    """Return how many blocks hold `num_tokens`."""
    return -(-num_tokens // block_tokens)
