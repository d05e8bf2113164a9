"""Vectors of texts without a model: weighted words, hashed into a few hundred dimensions.

Texts are near when they share words, not when they mean the same; for real neighbours in a real index that is enough.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

DIMENSIONS = 512

_WORD = re.compile(r"[a-z_][a-z0-9_]+")


class HashedWords:
    """Embeds texts; immutable.

    A word's weight is one plus the logarithm of its count in the text (tf), times that of the share of the texts that
    have it (idf). A hash of the word says which dimension it is added to, and with which sign, so that words which
    meet there cancel out in the mean (the hashing trick of Weinberger et al., 2009).

    Args:
        texts: What the weights of words are learnt from.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        found = Counter(word for text in texts for word in set(_words(text)))
        self._idf = {word: np.log((1 + len(texts)) / (1 + count)) + 1 for word, count in found.items()}
        self._unknown = np.log(1 + len(texts)) + 1

    def embed(self, texts: Iterable[str]) -> NDArray[np.float32]:
        """Return a vector of length 1 per text, or of length 0 for one without words.

        Returns:
            [texts, DIMENSIONS], f32.
        """
        return np.array([self._vector(text) for text in texts], np.float32).reshape(-1, DIMENSIONS)

    def _vector(self, text: str) -> NDArray[np.float64]:
        vector = np.zeros(DIMENSIONS)
        for word, count in sorted(Counter(_words(text)).items()):
            sign = 1 if word >> 31 else -1
            vector[word % DIMENSIONS] += sign * (1 + np.log(count)) * self._idf.get(word, self._unknown)
        return vector / (np.linalg.norm(vector) or 1.0)


def _words(text: str) -> list[int]:
    """Return 32-bit hashes: those of Python differ between processes."""
    return [zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())]
