"""Token ids of a text that is still arriving, or is replaced from some character on."""

import bisect

from headrace.text.cuts import SafeCuts
from headrace.text.model import TextModel

PIECE_CHARS = 512
"""Most characters between cuts, where there are any: so much is encoded again around a change."""


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
        num_same = _num_same(self._text, text)
        num_cuts = max(1, bisect.bisect_right(self._places, num_same - self._cuts.margin))
        del self._places[num_cuts:], self._counts[num_cuts:]
        del self._stable[self._counts[-1] :]
        num_kept = len(self._stable)
        self._text = text[: self._places[-1]]
        self._num_seen = self._places[-1]
        self.append(text[self._places[-1] :])
        return num_kept

    def complete(self) -> list[int]:
        """Return the tokens of the whole text."""
        return self._stable + self._model.encode(self._text[self._places[-1] :])


def _num_same(text: str, other: str) -> int:
    """Return how many characters two texts begin with in common."""
    low, high = 0, min(len(text), len(other))
    while low < high:  # Slices compare a thousand times faster than characters do one by one.
        middle = (low + high + 1) // 2
        if text[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
