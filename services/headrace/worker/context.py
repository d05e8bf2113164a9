"""A prompt that still arrives, as the jobs of a worker follow it."""

import logging
import sys
from collections.abc import AsyncIterator, Callable

from headrace.core.kept_since import KeptSince
from headrace.core.request import Revision, SequenceSpec
from headrace.errors import Cancelled, HeadraceError, InvalidRequest
from headrace.worker.engine import OpenSequence

logger = logging.getLogger(__name__)


class ArrivingPrompt:
    """The tokens known so far.

    Args:
        spec: The sequence as it was opened.

    Attributes:
        is_closed: Whether it is complete.
        least_kept: Leading tokens that every revision has kept.
    """

    def __init__(self, spec: SequenceSpec) -> None:
        self.is_closed = False
        self.least_kept = sys.maxsize
        self._tokens = list(spec.prompt)
        self._kept = KeptSince()

    @property
    def version(self) -> int:
        """Version of the prompt: revisions so far."""
        return self._kept.version

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens known."""
        return tuple(self._tokens)

    def take(self, revision: Revision) -> None:
        """Become the next version.

        Raises:
            InvalidRequest: it does not follow this one.
        """
        if self.is_closed or revision.version != self.version + 1 or revision.num_kept > len(self._tokens):
            raise InvalidRequest(
                f"revision {revision.version} keeps {revision.num_kept} tokens; version {self.version} has "
                f"{len(self._tokens)} and is {'closed' if self.is_closed else 'open'}",
                field="revision",
            )
        del self._tokens[revision.num_kept :]
        self._tokens.extend(revision.tokens)
        self.is_closed = revision.is_closed
        self.least_kept = min(self.least_kept, revision.num_kept)
        self._kept.revise(revision.num_kept)

    def still(self, version: int, num_tokens: int) -> int:
        """Return how many of the leading tokens of an earlier version, or of this one, are leading ones of it now."""
        return self._kept.still(version, num_tokens)


def not_opened() -> InvalidRequest:
    """Return what is wrong with a stream that does not begin with its opening."""
    return InvalidRequest("the first request of a context opens it, the others do not", field="open")


async def follow_revisions(
    revisions: AsyncIterator[Revision],
    sequence: OpenSequence,
    prompt: ArrivingPrompt,
    take: Callable[[OpenSequence, Revision], None] = OpenSequence.revise,
) -> None:
    """Hand revisions to the engine until there are no more; what is wrong with them fails the sequence.

    Args:
        revisions: May raise HeadraceErrors.
        sequence: In the engine.
        prompt: Takes the revisions.
        take: Hands a revision to the engine.
    """
    try:
        async for revision in revisions:
            prompt.take(revision)
            take(sequence, revision)
        if not prompt.is_closed:
            raise InvalidRequest("the context ended before it was closed", field="revision.is_closed")
    except HeadraceError as error:
        sequence.fail(error)
    except Exception as error:  # noqa: BLE001 what gRPC raises when a call ends under its reader is not public
        logger.info("context broke off", extra={"sequence_id": sequence.spec.sequence_id, "error": repr(error)})
        sequence.fail(Cancelled("the stream of the context broke off"))
