"""Tokens to text, one at a time."""

import codecs
from collections.abc import Callable


class TextStream:
    """Incremental detokenizer of one answer.

    Invariant: all pieces and the flush, joined, equal the text of all tokens decoded at
    once. Bytes that cannot become UTF-8 turn into U+FFFD as soon as that is certain; bytes
    that may still be completed wait. Each push costs the same, however long the answer is.

    Args:
        token_bytes: Bytes of a token, empty for tokens that are not shown.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the text that became certain with this token; never half a character."""
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """Return what is left at the end; an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)
