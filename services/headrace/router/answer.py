"""Tokens of one choice to text that may be shown."""

from headrace.core.request import FinishReason, Piece, Token
from headrace.text.model import TextModel
from headrace.text.stop import StopMatcher


class ChoiceText:
    """Holds back half characters and possible stop texts; ends the choice at a stop text.

    Args:
        choice: Index of the answer.
        text: The model's tokenizer.
        stop: Texts that end the answer and are not shown.
    """

    def __init__(self, choice: int, text: TextModel, stop: tuple[str, ...]) -> None:
        self._choice = choice
        self._stream = text.detokenizer()
        self._stops = StopMatcher(stop)
        self.num_tokens = 0
        self.is_finished = False

    def push(self, tokens: tuple[Token, ...]) -> Piece:
        """Return what became final with these tokens; tokens after a stop text are dropped."""
        shown: list[str] = []
        kept: list[Token] = []
        finish: FinishReason | None = None
        for token in tokens:
            kept.append(token)
            text, is_stopped = self._push_one(token)
            shown.append(text)
            finish = FinishReason.STOP if is_stopped else token.finish
            if finish is not None:
                break
        self.num_tokens += len(kept)
        self.is_finished = finish is not None
        return Piece(choice=self._choice, text="".join(shown), tokens=tuple(kept), finish=finish)

    def _push_one(self, token: Token) -> tuple[str, bool]:
        # The token that stopped the model is not part of the answer's text.
        text = "" if token.finish is FinishReason.STOP else self._stream.push(token.token_id)
        if token.finish is not None:
            text += self._stream.flush()
        final, is_matched = self._stops.push(text)
        if token.finish is not None and not is_matched:
            final += self._stops.flush()
        return final, is_matched
