"""Token probabilities in OpenAI's two forms."""

from collections.abc import Sequence

from headrace.core.request import Token
from headrace.text.model import TextModel


def token_text(text: TextModel, token_id: int) -> str:
    """Return a token as text; bytes that are no character alone become U+FFFD."""
    return text.token_bytes(token_id).decode("utf-8", "replace")


def chat_logprobs(text: TextModel, tokens: Sequence[Token]) -> dict[str, object]:
    """Return the `logprobs` value of a chat choice."""
    return {"content": [_chat_entry(text, token) for token in tokens], "refusal": None}


def _chat_entry(text: TextModel, token: Token) -> dict[str, object]:
    best = [_chat_token(text, token_id, logprob) for token_id, logprob in token.top_logprobs]
    return {**_chat_token(text, token.token_id, token.logprob), "top_logprobs": best}


def _chat_token(text: TextModel, token_id: int, logprob: float | None) -> dict[str, object]:
    raw = text.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


class CompletionLogprobs:
    """Builds the `logprobs` values of one completions choice; owns the offset in its text.

    Args:
        text: The model's tokenizer.
        offset: Characters of the choice's text before the first token (the echoed prompt).
    """

    def __init__(self, text: TextModel, offset: int = 0) -> None:
        self._text = text
        self._offset = offset
        self._stream = text.detokenizer()

    def take(self, tokens: Sequence[Token]) -> dict[str, object]:
        """Return the value for the next tokens of the choice."""
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._stream.push(token.token_id))
        return {
            "tokens": [self._name(token.token_id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._best(token) for token in tokens],
            "text_offset": offsets,
        }

    def _best(self, token: Token) -> dict[str, float | None]:
        """Return the alternatives and, as OpenAI does, the chosen token too."""
        best: dict[str, float | None] = {self._name(token_id): logprob for token_id, logprob in token.top_logprobs}
        best.setdefault(self._name(token.token_id), token.logprob)
        return best

    def _name(self, token_id: int) -> str:
        """Return the token's text; part of a character is spelled as bytes, to keep names apart."""
        raw = self._text.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
