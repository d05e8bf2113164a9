"""Token ids of a text that is still arriving, or is replaced from some character on."""

import bisect

from headrace.core.common_prefix import num_common
from headrace.text.cuts import SafeCuts
from headrace.text.model import TextModel

PIECE_CHARS = 512
"""Most characters between cuts, where there are any: so much is encoded again around a change."""

SLICE_CHARS = 4096
SLICE_SLACK_TOKENS = 16
"""A long part without a cut is counted in slices of so many characters; where two meet, so many tokens may differ."""


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
        # Tokens of the slices of what is behind the cut at `_sliced_at`.
        self._slices: list[int] = []
        self._sliced_at = 0

    @property
    def text(self) -> str:
        """The text so far."""
        return self._text

    @property
    def stable(self) -> list[int]:
        """The tokens that are final as long as the text only grows; not to be changed."""
        return self._stable

    def num_unsettled(self, text: str) -> int:
        """Return how many characters are looked at when `text` takes the place of all: those behind the last cut."""
        return len(text) - self._places[self._num_cuts(num_common(self._text, text)) - 1]

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
        num_cuts = self._num_cuts(num_same)
        # Where both are the same behind the last cut there was none, and none will be.
        num_seen = min(self._num_seen, num_same) if num_cuts == len(self._places) else 0
        del self._places[num_cuts:], self._counts[num_cuts:]
        del self._stable[self._counts[-1] :]
        num_kept = len(self._stable)
        self._text = text[: self._places[-1]]
        self._num_seen = max(self._places[-1], num_seen)
        del self._slices[max(0, num_same - self._sliced_at) // SLICE_CHARS :]
        self.append(text[self._places[-1] :])
        return num_kept

    def num_tokens(self, limit: int) -> int:
        """Return how many tokens the text has.

        A long last part without any cut is counted in slices, to a few tokens per slice: that must not take seconds for
        each word that is added. It is encoded as a whole if that decides whether the text has more than `limit` tokens.
        """
        place = self._places[-1]
        num_slices = (len(self._text) - place) // SLICE_CHARS
        if self._sliced_at != place:
            self._sliced_at = place
            self._slices.clear()
        while len(self._slices) < num_slices:
            start = place + len(self._slices) * SLICE_CHARS
            self._slices.append(len(self._model.encode(self._text[start : start + SLICE_CHARS])))
        rest = self._model.encode(self._text[place + num_slices * SLICE_CHARS :])
        found = len(self._stable) + sum(self._slices) + len(rest)
        is_near = num_slices and abs(found - limit) <= num_slices * SLICE_SLACK_TOKENS
        return len(self._stable) + len(self._model.encode(self._text[place:])) if is_near else found

    def _num_cuts(self, num_same: int) -> int:
        """Return how many cuts another text has too that begins with so many of the same characters; at least 1."""
        return max(1, bisect.bisect_right(self._places, num_same - self._cuts.margin))

    def complete(self) -> list[int]:
        """Return the tokens of the whole text."""
        return self._stable + self._model.encode(self._text[self._places[-1] :])
