"""Token ids of a text that is still arriving, or is replaced from some character on."""

import bisect

from headrace.core.common_prefix import num_common
from headrace.text.cuts import SafeCuts
from headrace.text.model import TextModel

PIECE_CHARS = 512
"""Most characters between cuts, where there are any: so much is encoded again around a change."""

MAX_TAIL_CHARS = 4096
"""Longest part behind the last cut that is encoded just to count its tokens."""


class GrowingTokens:
    """The tokens of a text, encoded piece by piece; always those that the whole text would be encoded to.

    Only the stable ones may be used before the text is complete: whatever is appended does not change them.

    Args:
        model: Whose tokens they are.
        cuts: Of the model's tokenizer.
    """

    def __init__(self, model: TextModel, cuts: SafeCuts) -> None:
        self._model = model
        self._cuts = cuts
        self._text = ""
        self._stable: list[int] = []
        # Places where the text was cut, and the tokens before each; the last cut ends the stable tokens.
        self._places = [0]
        self._counts = [0]
        self._num_seen = 0

    @property
    def text(self) -> str:
        """The text so far."""
        return self._text

    @property
    def stable(self) -> list[int]:
        """The tokens that are final as long as the text only grows; not to be changed."""
        return self._stable

    def append(self, text: str) -> None:
        """Add to the end of the text."""
        self._text += text
        # What was no cut will be none, but for what might have become an added token.
        seen = max(self._places[-1], self._num_seen - self._cuts.margin)
        while seen < len(self._text):
            place = self._cuts.last(self._text, seen, seen + PIECE_CHARS)
            if place > seen:
                self._stable += self._model.encode(self._text[self._places[-1] : place])
                self._places.append(place)
                self._counts.append(len(self._stable))
                seen = place
            else:
                seen += PIECE_CHARS - 1
        self._num_seen = len(self._text)

    def replace(self, text: str) -> int:
        """Take another text in place of all; what both begin with is not encoded again.

        Returns:
            How many of the stable tokens from before are stable still, at least.
        """
        num_same = num_common(self._text, text)
        num_cuts = max(1, bisect.bisect_right(self._places, num_same - self._cuts.margin))
        del self._places[num_cuts:], self._counts[num_cuts:]
        del self._stable[self._counts[-1] :]
        num_kept = len(self._stable)
        self._text = text[: self._places[-1]]
        self._num_seen = self._places[-1]
        self.append(text[self._places[-1] :])
        return num_kept

    def num_tokens(self) -> int:
        """Return how many tokens the text has; at least so many, if its last part is long and has no cut."""
        tail = self._text[self._places[-1] :]
        # A text without a cut is encoded as a whole for each change of it: that must not cost seconds.
        num_last = len(self._model.encode(tail)) if len(tail) <= MAX_TAIL_CHARS else self._model.min_num_tokens(tail)
        return len(self._stable) + num_last

    def complete(self) -> list[int]:
        """Return the tokens of the whole text."""
        return self._stable + self._model.encode(self._text[self._places[-1] :])
