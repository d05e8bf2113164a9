"""Blocks of KV cache: their ids, their hashes and their layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

import blake3

BlockId = NewType("BlockId", int)
"""Index of a block in its pool."""

BlockHash = NewType("BlockHash", bytes)
"""16 bytes that name the content of a block: everything from the sequence's start to the block's end."""

HASH_BYTES = 16
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


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


def root_hash(model_fingerprint: str, cache_salt: bytes = b"") -> BlockHash:
    """Return the parent of every first block of one model and tenant.

    Args:
        model_fingerprint: Digest of weights, dtype, layout and kernels.
        cache_salt: Key of the tenant; empty is the public root.
    """
    hasher = blake3.blake3(b"headrace-root-1\0")
    hasher.update(len(model_fingerprint).to_bytes(4, "little") + model_fingerprint.encode())
    hasher.update(len(cache_salt).to_bytes(4, "little") + cache_salt)
    return BlockHash(hasher.digest(HASH_BYTES))


def chain_hash(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Return the hash of a full block that follows `parent`."""
    body = b"".join(token.to_bytes(4, "little") for token in tokens)
    return BlockHash(blake3.blake3(parent + body).digest(HASH_BYTES))


def block_hashes(root: BlockHash, tokens: Sequence[int], block_tokens: int) -> tuple[BlockHash, ...]:
    """Return the chained hash of each full block of `tokens`; a partial last block has none."""
    hashes: list[BlockHash] = []
    parent = root
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = chain_hash(parent, tokens[start : start + block_tokens])
        hashes.append(parent)
    return tuple(hashes)


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    """Return how many blocks hold `num_tokens`."""
    return -(-num_tokens // block_tokens)
