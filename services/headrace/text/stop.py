"""Stop texts that may be split over tokens."""

from collections.abc import Sequence


class _Pattern:
    """One stop text and the Knuth-Morris-Pratt state of how much of it has been seen.

    Knuth, Morris, Pratt: Fast Pattern Matching in Strings (1977), section 2.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._borders = _borders(text)

    def step(self, character: str) -> bool:
        """Take one character; return whether the stop text is now complete."""
        length = self.num_matched
        while length and self.text[length] != character:
            length = self._borders[length - 1]
        if self.text[length] == character:
            length += 1
        self.num_matched = length
        return length == len(self.text)


def _borders(text: str) -> list[int]:
    """Return for each prefix the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        if text[index] == text[length]:
            length += 1
        borders[index] = length
    return borders


class StopMatcher:
    """Finds the first stop text to be completed and holds back what may become one.

    How the text is cut into pushes changes nothing. When several stop texts end at the same
    character the longest is taken, so that no part of any of them is shown.

    Args:
        stops: Non-empty texts; none means that all text passes at once.

    Raises:
        ValueError: a stop text is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop text is empty")
        self._patterns = [_Pattern(stop) for stop in stops]
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._held = ""
        self._is_matched = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take text; return what is final now and whether a stop text was completed.

        After a match nothing more comes out.
        """
        if self._is_matched:
            return "", True
        # Most text holds no first character of any stop: skip the walk, which costs 0.1 us each.
        if not self._held and self._first_characters.isdisjoint(text):
            return text, False
        held = self._held + text
        for index in range(len(self._held), len(held)):
            num_stopped = self._complete(held[index])
            if num_stopped:
                self._is_matched = True
                self._held = ""
                return held[: index + 1 - num_stopped], True
        num_held = max(pattern.num_matched for pattern in self._patterns)
        cut = len(held) - num_held
        self._held = held[cut:]
        return held[:cut], False

    def flush(self) -> str:
        """Return the text still held back; call it when the answer ends without a match."""
        held, self._held = self._held, ""
        for pattern in self._patterns:
            pattern.num_matched = 0
        return held

    def _complete(self, character: str) -> int:
        """Step all patterns; return the length of the longest completed one, or 0."""
        return max([len(pattern.text) for pattern in self._patterns if pattern.step(character)], default=0)
