"""What all contexts of an ingestor share."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.clock import Clock
from headrace.errors import Saturated
from headrace.ingestor.config import IngestorConfig
from headrace.ingestor.routers import Routers
from headrace.text.cuts import SafeCuts
from headrace.text.model import TextModel

FULL_RETRY_S = 1.0


@dataclass(slots=True, kw_only=True)
class IngestCounts:
    """What has happened since the start.

    Attributes:
        opened: Contexts.
        operations: Carried out.
        refused: Operations that changed nothing.
        revisions: Sent to routers.
        sent_tokens: Sent to routers.
        dropped_tokens: Of them, taken back by a later revision.
        resumed: Calls that took a context up again.
        expired: Contexts given up because nobody came back or nothing came any more.
    """

    opened: int = 0
    operations: int = 0
    refused: int = 0
    revisions: int = 0
    sent_tokens: int = 0
    dropped_tokens: int = 0
    resumed: int = 0
    expired: int = 0


class TextRoom:
    """Bounds the characters that all contexts keep together.

    Args:
        max_chars: Most of them.
    """

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars
        self._sizes: dict[str, int] = {}
        self.num_chars = 0

    def resize(self, name: str, num_chars: int) -> None:
        """Take note of the size of a text.

        Raises:
            Saturated: all together would be too large; the text counts as before.
        """
        total = self.num_chars + num_chars - self._sizes.get(name, 0)
        if total > self._max_chars:
            raise Saturated(
                "the contexts that are open have as much text as may be kept",
                limit=f"{self._max_chars} characters",
                retry_after_s=FULL_RETRY_S,
            )
        self._sizes[name], self.num_chars = num_chars, total

    def forget(self, name: str) -> None:
        """Take note that a text is gone; it may be unknown."""
        self.num_chars -= self._sizes.pop(name, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestParts:
    """What all contexts share.

    Attributes:
        config: Bounds.
        model: Tokenizer and chat template.
        cuts: Of the tokenizer.
        routers: Who has them computed.
        clock: For deadlines and grace times.
        tasks: Outlives every context.
        entropy: Returns 64 random bits, for seeds.
        room: For their text.
        counts: Of what happened.
    """

    config: IngestorConfig
    model: TextModel
    cuts: SafeCuts
    routers: Routers
    clock: Clock
    tasks: asyncio.TaskGroup
    entropy: Callable[[], int]
    room: TextRoom
    counts: IngestCounts = field(default_factory=IngestCounts)
