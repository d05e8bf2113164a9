"""An answer that is asked for again: what of it has not arrived by an earlier attempt."""

from headrace.core.request import Piece
from headrace.errors import InternalError


class RepeatedAnswer:
    """Leaves out of each attempt's pieces what earlier attempts have brought."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._num_chars = 0
        self._num_tokens_again = 0
        self._num_chars_again = 0

    def begin(self) -> None:
        """Take note that an attempt begins, with the first token of the answer."""
        self._num_tokens_again = self._num_chars_again = 0

    def fresh(self, piece: Piece) -> Piece:
        """Return what is new in the next piece of this attempt, which may be nothing.

        Raises:
            InternalError: the answer is not the one that an earlier attempt began.
        """
        for token in piece.tokens:
            if token.cursor < len(self._tokens) and self._tokens[token.cursor] != token.token_id:
                raise InternalError("the answer differs from what another router had begun to answer")
        tokens = tuple(token for token in piece.tokens if token.cursor >= len(self._tokens))
        self._tokens.extend(token.token_id for token in tokens)
        self._num_tokens_again += len(piece.tokens)
        if piece.finish is not None and self._num_tokens_again < len(self._tokens):
            raise InternalError("the answer is shorter than what another router had begun to answer")
        num_known = max(0, self._num_chars - self._num_chars_again)
        self._num_chars_again += len(piece.text)
        self._num_chars = max(self._num_chars, self._num_chars_again)
        return Piece(
            choice=piece.choice, text=piece.text[num_known:], tokens=tokens, finish=piece.finish, usage=piece.usage
        )
