"""Where a text that still grows can be cut: what comes later does not change the tokens before.

A tokenizer splits text into words by a pattern before it merges bytes, and never merges over the end of a word. A place
where any text has the words of its two halves is a cut: the tokens before it are final.
"""

import itertools
from collections.abc import Callable, Collection, Sequence

from tokenizers import AddedToken, Tokenizer, normalizers

_LEFT = ("x", "s", "中", "é", "7", "'", ".", "。")
_RIGHT = (" ", "\n", ".", "(", "。", "'")
_AROUND = ("x", "s", "中", "7", "'", ".", "。", " ", "\n", "\r", "\t")
_BEFORE = ("", *_AROUND)
_BEHIND = ("", *_AROUND, *map("".join, itertools.product(_AROUND, repeat=2)))
_CJK_MARKS = frozenset("、。，！？；：「」『』（）【】")
_FAR = 0x20000
"""Letters from here on are too new, or too rare, to be letters for every library."""

WordStarts = Callable[[str], Collection[int]]


class SafeCuts:
    """Finds the last cut of a text, for one tokenizer.

    Which pairs of kinds of characters are cuts is asked of the tokenizer itself, once: a pair counts if every text of
    up to five characters around it, made of one sample of each kind, has the words of its two halves.

    Args:
        word_starts: Returns the places in a text where words start; None when nothing is known: there are no cuts.
        added: Texts that become one token wherever they stand; no cut goes through one, or through what may become one.

    Attributes:
        margin: Characters behind a cut that may have had a part in choosing it.
    """

    def __init__(self, word_starts: WordStarts | None, added: Sequence[str]) -> None:
        self._pairs = _safe_pairs(word_starts) if word_starts is not None else frozenset()
        self._added = tuple(added)
        self._begun = {text[:size] for text in added for size in range(1, len(text))}
        self.margin = max(map(len, added), default=1)

    def last(self, text: str, after: int, end: int) -> int:
        """Return the last cut of `text` beyond the place `after` and before `end`, or `after` if there is none."""
        for place in range(min(end, len(text)) - 1, after, -1):
            if (_kind(text[place - 1]), _kind(text[place])) in self._pairs and not self._is_inside(text, place):
                return place
        return after

    def _is_inside(self, text: str, place: int) -> bool:
        """Return whether an added token goes over a place, or may once the text goes on."""
        for start in range(max(0, place - self.margin), place):
            if text[start:place] in self._begun and any(_may_go_over(each, text, start, place) for each in self._added):
                return True
        return False


def cuts_of(tokenizer: Tokenizer) -> SafeCuts:
    """Return the cuts of a tokenizer; none if its tokens depend on more than the words that it splits text into."""
    added = tokenizer.get_added_tokens_decoder().values()
    words = tokenizer.pre_tokenizer
    if words is None or not _is_local(tokenizer.normalizer) or not all(map(_stands_alone, added)):
        return SafeCuts(None, ())

    def word_starts(text: str) -> Collection[int]:
        return {start for _, (start, _) in words.pre_tokenize_str(text)}

    return SafeCuts(word_starts, [token.content for token in added])


def _is_local(normalizer: normalizers.Normalizer | None) -> bool:
    """Return whether normalizing two halves of a text gives the halves of the normalized text, at every cut.

    Form C joins characters with marks that follow them, and none of the kinds behind a cut is such a mark.
    """
    return normalizer is None or isinstance(normalizer, normalizers.NFC)


def _stands_alone(token: AddedToken) -> bool:
    return not (token.single_word or token.lstrip or token.rstrip)


def _may_go_over(added: str, text: str, start: int, place: int) -> bool:
    """Return whether `text` has `added`, or its beginning and nothing more, from `start` to beyond `place`."""
    return start + len(added) > place and added.startswith(text[start : start + len(added)])


def _kind(character: str) -> str:
    """Return the sample of a character's kind; one of no kind stands for itself and is part of no cut."""
    if character in " \n'(":
        return character
    if character.isascii():
        if character.isdigit():
            return "7"
        if character.isalpha():
            return "x"
        return "." if character.isprintable() else character
    if character in _CJK_MARKS:
        return "。"
    return "中" if character.isalpha() and ord(character) < _FAR else character


def _safe_pairs(word_starts: WordStarts) -> frozenset[tuple[str, str]]:
    """Return the pairs of kinds between which any text can be cut."""
    heads = {before + left: frozenset(word_starts(before + left)) for before in _BEFORE for left in _LEFT}
    tails = {right + behind: frozenset(word_starts(right + behind)) for right in _RIGHT for behind in _BEHIND}

    def is_cut(head: str, tail: str) -> bool:
        # A pattern may look behind a word's end: a head must have the words that it has alone.
        return set(word_starts(head + tail)) == heads[head] | {len(head) + start for start in tails[tail]}

    pairs = {
        (left, right)
        for left, right in itertools.product(_LEFT, _RIGHT)
        if all(is_cut(before + left, right + behind) for before in _BEFORE for behind in _BEHIND)
    }
    # Two samples stand for letters: contractions of English and accents are what patterns may treat apart.
    same = {"x": "s", "s": "x", "中": "é", "é": "中"}
    return frozenset((left, right) for left, right in pairs if (same.get(left, left), right) in pairs)
