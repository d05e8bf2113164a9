"""Where a block lies and how its KV came to be: what the index knows of a block besides its name."""

from dataclasses import dataclass
from enum import IntEnum


class Tier(IntEnum):
    """Where a block lies, fastest first; numbers are those of the wire."""

    DEVICE = 1
    """A worker's own pool."""
    DRAM = 2
    """Host memory of a kvstore."""
    DISK = 3
    """Disk of a kvstore."""


class Provenance(IntEnum):
    """How a block's KV came to be; numbers are those of the wire."""

    EXACT = 1
    """Computed as part of a prompt, after exactly the tokens that its hash names."""
    CHUNK = 2
    """Encoded alone, without what stands before it."""
    DECODED = 3
    """Computed token by token while an answer was generated."""
    DERIVED = 4
    """Made from other KV: shifted, blended, reduced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """How a block's KV came to be, and under which settings.

    Attributes:
        policy_id: Hash of every lossy setting that was active upstream; empty is none.
    """

    provenance: Provenance = Provenance.EXACT
    policy_id: str = ""

    def serves(self, policy_id: str) -> bool:
        """Return whether a request may be given such a block.

        Args:
            policy_id: The lossy settings that the request accepts; empty accepts exact KV alone.
        """
        is_whole = self.provenance in (Provenance.EXACT, Provenance.DECODED)
        return (is_whole and not self.policy_id) or (bool(policy_id) and self.policy_id == policy_id)


EXACT = Origin()

DECODED = Origin(provenance=Provenance.DECODED)

FOREIGN_PREFIX = "foreign/"
"""Begins the location of an engine that is none of ours: what it holds can be known and not be read."""


def is_foreign(location: str) -> bool:
    """Return whether nobody of the cluster can read from a location."""
    return location.startswith(FOREIGN_PREFIX)
