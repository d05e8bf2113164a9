"""What a slot of the disk tier says of its block: one sector, whole or worthless. Pure."""

import struct
from dataclasses import dataclass
from functools import lru_cache

import xxhash

from headrace.core.block import HASH_BYTES, BlockHash
from headrace.core.placement import Origin, Provenance
from headrace.kvstore.stored_block import StoredBlock

SECTOR_BYTES = 512
"""Of a header: disks write a sector whole or not at all."""

_MAGIC = b"HRKV"
_VERSION = 2
_CHECKSUM = struct.Struct("<Q")
_FACTS = struct.Struct("<4sHBxQI16s16s16s16sQQHH")
_FORMAT = struct.Struct("<4sHxxQ16s")
_NOBODY = bytes(HASH_BYTES)
"""Stands for no hash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A slot's content.

    Attributes:
        block: What it holds.
        checksum: xxh3_128 of the payload.
    """

    block: StoredBlock
    checksum: bytes


def format_sector(block_bytes: int, format_id: bytes) -> bytes:
    """Return the sector that names a format: of headers, of payloads, and of what `format_id` stands for."""
    name = _FORMAT.pack(_MAGIC, _VERSION, block_bytes, xxhash.xxh3_128_digest(format_id))
    return name.ljust(SECTOR_BYTES, b"\0")


class HeaderForm:
    """Turns headers into sectors and back.

    A sector's checksum depends on its format and its slot: in another place, or left by another format, it is
    worthless.

    Args:
        sector: That names the format.
    """

    def __init__(self, sector: bytes) -> None:
        self._seed = xxhash.xxh3_64_intdigest(sector)

    def encode(self, slot: int, header: Header) -> bytes:
        """Return the sector of a slot."""
        block = header.block
        tenant, policy = block.tenant.encode(), block.origin.policy_id.encode()
        facts = _FACTS.pack(
            _MAGIC,
            _VERSION,
            block.origin.provenance,
            block.stored_unix_ms,
            block.num_blocks_before,
            block.block_hash,
            block.parent or _NOBODY,
            block.segment_key or _NOBODY,
            header.checksum,
            block.digest,
            slot,
            len(tenant),
            len(policy),
        )
        body = (facts + tenant + policy).ljust(SECTOR_BYTES - _CHECKSUM.size, b"\0")
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body, seed=self._seed))

    def decode(self, slot: int, sector: bytes) -> Header | None:
        """Return what a slot's sector says, or None where it is not whole or not of this format and slot."""
        body, (checksum,) = sector[: -_CHECKSUM.size], _CHECKSUM.unpack(sector[-_CHECKSUM.size :])
        if xxhash.xxh3_64_intdigest(body, seed=self._seed) != checksum:
            return None
        magic, version, provenance, stored_ms, before, *rest = _FACTS.unpack_from(body)
        name, parent, segment_key, payload, digest, place, *sizes = rest
        if (magic, version, place) != (_MAGIC, _VERSION, slot):
            return None
        texts, (tenant_bytes, policy_bytes) = body[_FACTS.size :], sizes
        policy = texts[tenant_bytes : tenant_bytes + policy_bytes].decode()
        block = StoredBlock(
            block_hash=BlockHash(name),
            tenant=texts[:tenant_bytes].decode(),
            digest=digest,
            num_blocks_before=before,
            origin=_origin(provenance, policy),
            stored_unix_ms=stored_ms,
            parent=_hash(parent),
            segment_key=_hash(segment_key),
        )
        return Header(block=block, checksum=payload)


def _hash(written: bytes) -> BlockHash | None:
    return None if written == _NOBODY else BlockHash(written)


@lru_cache(maxsize=1024)
def _origin(provenance: int, policy_id: str) -> Origin:
    # Few differ among the many headers of a start, and each takes as long to make as half of its header.
    return Origin(provenance=Provenance(provenance), policy_id=policy_id)
