"""Who holds blocks, as a list that a person reads shows it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who keeps blocks from being reused, for a list that a person reads.

    Attributes:
        lease_id: Name of the lease or writer.
        owner: Whose work it is.
        reader: Who else reads or writes the blocks.
        epoch: Lifetime of the reader's process.
        deadline_s: When the clock ends it; None for writers, whom only their own word or a quarantine ends.
        num_blocks: Blocks held.
    """

    lease_id: str
    owner: str = ""
    reader: str = ""
    epoch: str = ""
    deadline_s: float | None = None
    num_blocks: int
