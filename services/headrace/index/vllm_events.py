"""Messages of vLLM's KV events and their bytes (docs/interop.md names the versions that were read)."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Raw, Struct

from headrace.core.placement import Tier
from headrace.errors import InvalidRequest

SEQUENCE_BYTES = 8
END_OF_REPLAY = 2**64 - 1
"""Sequence of the message that ends a replay: -1 in 64 bits."""

MEDIUMS = {Tier.DEVICE: "GPU", Tier.DRAM: "CPU", Tier.DISK: "STORAGE"}
"""What vLLM 0.27 calls the tiers."""

TIERS = {
    None: Tier.DEVICE,
    "GPU": Tier.DEVICE,
    "DEVICE": Tier.DEVICE,
    "CPU": Tier.DRAM,
    "CPU_PINNED": Tier.DRAM,
    "CPU_TIER1": Tier.DRAM,
    "STORAGE": Tier.DISK,
    "FS": Tier.DISK,
    "OBJ": Tier.DISK,
    "DISK": Tier.DISK,
    "NVME": Tier.DISK,
    "CPU_TIER2": Tier.DISK,
}
"""Tiers under all names that vLLM, SGLang and Dynamo have given them."""

ForeignHash: TypeAlias = int | Annotated[bytes, Meta(max_length=64)]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, lt=2**32)]

_WHOLE_CONTEXT_KINDS = {None, "full_attention", "mla_attention", "sink_full_attention"}
_NIL = Raw(b"\xc0")
_ARRAY_STARTS = {bytes((start,)) for start in (*range(0x90, 0xA0), 0xDC, 0xDD)}


class EventForm(Enum):
    """How the fields of an event are laid out."""

    ARRAY = "array"
    """By place, as vLLM did until June 2026; Dynamo and llm-d still read it."""
    MAP = "map"
    """By name."""


# The fields of each message stand in the order of the array form. What is only tested for being there stays
# undecoded, so that no nesting in it costs anything.
class BlockStored(Struct, frozen=True, tag=True):
    """Consecutive blocks of one chain came to a tier.

    Attributes:
        parent_block_hash: Block before the first one; None where the chain begins.
        token_ids: Of all blocks; empty where a lower tier knows hashes only.
        block_size: Tokens of each block.
        medium: Name of the tier.
        extra_keys: What else was mixed into the hash of each block.
        group_idx: Which of a hybrid model's caches.
    """

    block_hashes: list[ForeignHash]
    parent_block_hash: ForeignHash | None
    token_ids: list[TokenId]
    block_size: int
    lora_id: Raw = _NIL
    medium: str | None = None
    lora_name: Raw = _NIL
    extra_keys: Raw = _NIL
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    cache_salt: Raw = _NIL

    @property
    def is_plain(self) -> bool:
        """Whether tokens alone name the blocks: no adapter, no salt, no media."""
        named = (self.lora_id, self.lora_name, self.cache_salt)
        return all(bytes(raw) == b"\xc0" for raw in named) and _holds_only_nil(self.extra_keys)

    @property
    def has_whole_context(self) -> bool:
        """Whether the cache keeps all tokens of a prefix, not only a window or a state."""
        return self.kv_cache_spec_kind in _WHOLE_CONTEXT_KINDS and self.kv_cache_spec_sliding_window is None


class BlockRemoved(Struct, frozen=True, tag=True):
    """Blocks left a tier."""

    block_hashes: list[ForeignHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(Struct, frozen=True, tag=True):
    """Nothing is left."""


KvEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class _StoredArray(BlockStored, frozen=True, array_like=True, tag="BlockStored"):
    """A stored event by place."""


class _RemovedArray(BlockRemoved, frozen=True, array_like=True, tag="BlockRemoved"):
    """A removed event by place."""


class _ClearedArray(AllBlocksCleared, frozen=True, array_like=True, tag="AllBlocksCleared"):
    """A cleared event by place."""


class _BatchMap(Struct, frozen=True):
    events: list[Raw]


class _BatchArray(Struct, frozen=True, array_like=True):
    ts: float
    events: list[Raw]


_batches_by_place = msgspec.msgpack.Decoder(_BatchArray)
_batches_by_name = msgspec.msgpack.Decoder(_BatchMap)
_events_by_place: msgspec.msgpack.Decoder[KvEvent] = msgspec.msgpack.Decoder(
    _StoredArray | _RemovedArray | _ClearedArray
)
_events_by_name: msgspec.msgpack.Decoder[KvEvent] = msgspec.msgpack.Decoder(
    BlockStored | BlockRemoved | AllBlocksCleared
)
_nils = msgspec.msgpack.Decoder(list[None] | None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one message said.

    Attributes:
        num_malformed: Further events in it that are of no known kind or break its rules.
    """

    events: tuple[KvEvent, ...]
    num_malformed: int = 0


def decode_batch(payload: bytes) -> Batch:
    """Read a message in any version of the format, from anyone; memory is bounded by its length.

    Raises:
        InvalidRequest: it is no batch of events.
    """
    try:
        parts = (_batches_by_place if _is_array(payload) else _batches_by_name).decode(payload).events
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("a message is no batch of vLLM's KV events", field="payload") from error
    read = [event for event in map(_decode_event, parts) if event is not None]
    return Batch(events=tuple(read), num_malformed=len(parts) - len(read))


def encode_batch(timestamp_s: float, events: Iterable[KvEvent], rank: int, form: EventForm) -> bytes:
    """Write a message.

    Args:
        timestamp_s: Unix time.
        events: What happened, in order.
        rank: Data-parallel rank of the sender.
        form: How to lay out the events.
    """
    fields = [_fields(event) for event in events]
    laid_out = fields if form is EventForm.MAP else [list(named.values()) for named in fields]
    return msgspec.msgpack.encode([timestamp_s, laid_out, rank])


def _decode_event(part: Raw) -> KvEvent | None:
    data = bytes(part)
    try:
        return (_events_by_place if _is_array(data) else _events_by_name).decode(data)
    except (ValueError, RecursionError):
        return None


def _is_array(data: bytes) -> bool:
    return data[:1] in _ARRAY_STARTS


def _fields(event: KvEvent) -> dict[str, object]:
    """Return the fields that every version has, in the order of the array form."""
    named: dict[str, object] = {"type": event.__struct_config__.tag}
    if isinstance(event, BlockStored):
        named |= {
            "block_hashes": event.block_hashes,
            "parent_block_hash": event.parent_block_hash,
            "token_ids": event.token_ids,
            "block_size": event.block_size,
            "lora_id": None,
            "medium": event.medium,
            "lora_name": None,
        }
    elif isinstance(event, BlockRemoved):
        named |= {"block_hashes": event.block_hashes, "medium": event.medium}
    return named


def _holds_only_nil(raw: Raw) -> bool:
    try:
        _nils.decode(raw)
    except (ValueError, RecursionError):
        return False
    return True
