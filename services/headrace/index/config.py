"""Settings of the shared index."""

from dataclasses import dataclass

from headrace.settings import Count


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """How a process takes part in the index; where its log is, says `redis`.

    Attributes:
        key_prefix: Begins the name of every key in Redis; one per cluster.
        budget_bytes: Memory that a copy of the index may take; blocks of little value leave for others.
        max_locations: Most workers and kvstores.
        forget_after_s: A location that has been silent for so long is dropped.
    """

    key_prefix: str = "headrace:index"
    budget_bytes: Count = 256 << 20
    max_locations: Count = 1024
    forget_after_s: float = 600.0
