"""What a client may send of a prompt that still arrives."""

from collections.abc import AsyncIterator, Callable

from headrace.core.request import Revision
from headrace.core.validate import RequestLimits, check_room
from headrace.core.wire import revision_from_proto
from headrace.errors import InvalidRequest
from headrace.v1 import router_pb2


class ArrivingContext:
    """Checks revisions one after the other.

    Args:
        limits: Of the model.
        num_tokens: Tokens that the context was opened with.
        max_tokens: Longest answer; 0 takes what fits.

    Attributes:
        version: Of the context.
    """

    def __init__(self, limits: RequestLimits, num_tokens: int, max_tokens: int) -> None:
        self.version = 0
        self._limits = limits
        self._num_tokens = num_tokens
        self._num_final = 0
        self._max_tokens = max_tokens
        self._is_closed = False

    def check_final(self, num_final: int) -> int:
        """Return how many leading tokens stay.

        Raises:
            InvalidRequest: there are not so many, or fewer than was said before.
        """
        if not self._num_final <= num_final <= self._num_tokens:
            raise InvalidRequest(
                f"{num_final} of {self._num_tokens} tokens are said to stay; {self._num_final} were before",
                field="final_tokens",
                limit=f"from {self._num_final} to {self._num_tokens}",
            )
        self._num_final = num_final
        return num_final

    async def revisions(
        self, requests: AsyncIterator[router_pb2.GenerateContextRequest], refuse_large: Callable[[int], None]
    ) -> AsyncIterator[Revision]:
        """Yield what requests ask for, until one closes the context.

        Raises:
            InvalidRequest: one is wrong.
        """
        async for request in requests:
            if not request.HasField("revision"):
                raise InvalidRequest("the context is open already: what follows revises it", field="revision")
            refuse_large(request.ByteSize())
            revision = revision_from_proto(request.revision)
            self._take(revision)
            yield revision

    def _take(self, revision: Revision) -> None:
        if self._is_closed:
            raise InvalidRequest("the context is closed: nothing may follow", field="revision")
        if revision.version != self.version + 1:
            raise InvalidRequest(
                f"version {revision.version} follows {self.version}",
                field="revision.version",
                limit=f"{self.version + 1}",
            )
        if not self._num_final <= revision.num_kept <= self._num_tokens:
            raise InvalidRequest(
                f"{revision.num_kept} of {self._num_tokens} tokens kept, of which {self._num_final} stay",
                field="revision.kept_tokens",
                limit=f"from {self._num_final} to {self._num_tokens}",
            )
        vocab_size, num_tokens = self._limits.vocab_size, revision.num_kept + len(revision.tokens)
        if revision.tokens and max(revision.tokens) >= vocab_size:
            raise InvalidRequest(
                "a token id is not in the vocabulary", field="revision.token_ids", limit=f"{vocab_size}"
            )
        check_room(num_tokens, max(1, self._max_tokens), self._limits)
        if revision.is_closed and not num_tokens:
            raise InvalidRequest("a closed context needs at least 1 token", field="revision.is_closed")
        self.version, self._num_tokens, self._is_closed = revision.version, num_tokens, revision.is_closed
        if not revision.is_closed:
            self.check_final(revision.num_final)
