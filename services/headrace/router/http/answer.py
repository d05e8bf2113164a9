"""What an answer collects while its pieces arrive."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.core.request import FinishReason, GenerationRequest, Piece, Token, Usage
from headrace.errors import InternalError


@dataclass(slots=True)
class Choice:
    """One answer to one prompt; grows with every piece."""

    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish: FinishReason | None = None


class Answer:
    """Collects the choices of all prompts of one HTTP request.

    Invariant: choice `index` belongs to prompt `index // num_choices`.

    Args:
        requests: One per prompt, all with the same number of choices.
        keeps_content: Whether texts and tokens are kept; a stream hands them on instead.
    """

    def __init__(self, requests: Sequence[GenerationRequest], *, keeps_content: bool) -> None:
        self._num_choices = requests[0].num_choices
        self._keeps_content = keeps_content
        self._usages: list[Usage] = []
        self.choices = [Choice() for _ in range(len(requests) * self._num_choices)]

    def take(self, request_index: int, piece: Piece) -> int:
        """Note a piece; return the index of its choice in the answer."""
        index = request_index * self._num_choices + piece.choice
        choice = self.choices[index]
        if self._keeps_content:
            choice.texts.append(piece.text)
            choice.tokens.extend(piece.tokens)
        choice.finish = piece.finish or choice.finish
        if piece.usage is not None:
            self._usages.append(piece.usage)
        return index

    async def collect(self, request_index: int, piece: Piece) -> None:
        """Note a piece; the form in which whole answers are gathered."""
        self.take(request_index, piece)

    def prompt_index(self, index: int) -> int:
        """Return which prompt a choice answers."""
        return index // self._num_choices

    def check_finished(self) -> None:
        """Refuse to pass off a broken answer as whole.

        Raises:
            InternalError: a choice ended without a reason.
        """
        if any(choice.finish is None for choice in self.choices):
            raise InternalError("an answer ended without a finish reason")

    def usage(self) -> Usage:
        """Return the token counts of all prompts together."""
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in self._usages),
            completion_tokens=sum(usage.completion_tokens for usage in self._usages),
            cached_tokens=sum(usage.cached_tokens for usage in self._usages),
        )
