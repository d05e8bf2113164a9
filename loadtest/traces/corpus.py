"""English text that is there wherever Python is: the reference that `help()` prints, of the module pydoc_data.topics.

Topics repeat each other's paragraphs, and seven grammars are long: both are left out. With CPython 3.11.7 some 360,000
characters remain, at 4.1 characters per token of SmolLM2's tokenizer. The text is part of Python and differs between
its versions: traces made of it are the same only under the same one.
"""

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from contexts import Append, Event, Replace, Segment, Text, Tokens, Update
from msgspec.structs import replace

CHARACTERS_PER_TOKEN = 4.1
"""SmolLM2's tokenizer over the whole text, November 2026."""
REPEATED_CHARACTERS = 60
"""Paragraphs of this length and more are kept once; shorter ones are headings and the like."""
MOST_CHARACTERS = 2_000
"""The longest paragraph that is kept."""
SENTENCE_CHARACTERS = (60, 240)
GAP = "\n\n"

_SENTENCE = re.compile(r"[A-Z][^.!?]*(?:[.!?](?!\s)[^.!?]*)*[.!?](?=\s|$)")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Paragraphs of text in order."""

    paragraphs: tuple[str, ...]

    def passages(self, characters: int) -> tuple[str, ...]:
        """Return the whole text in passages that end with the paragraph that fills them; the last may be shorter."""
        passages, first, length = [], 0, 0
        for index, paragraph in enumerate(self.paragraphs, 1):
            length += len(paragraph) + len(GAP)
            if length >= characters or index == len(self.paragraphs):
                passages.append(GAP.join(self.paragraphs[first:index]))
                first, length = index, 0
        return tuple(passages)

    def excerpt(self, first: int, characters: int) -> str:
        """Return paragraphs from some one on, as many as come nearest to a length but at least one.

        Args:
            first: Which one; the count goes on at the first behind the last.
            characters: Length.
        """
        found = [self._paragraph(first)]
        length = len(found[0])
        while True:
            paragraph = self._paragraph(first + len(found))
            longer = length + len(GAP) + len(paragraph)
            if abs(longer - characters) >= abs(length - characters):
                return GAP.join(found)
            found.append(paragraph)
            length = longer

    def sentences(self) -> tuple[str, ...]:
        """Return the sentences that are neither short nor long, on one line each."""
        least, most = SENTENCE_CHARACTERS
        prose = (" ".join(paragraph.split()) for paragraph in self.paragraphs if not paragraph.startswith(" "))
        found = (match.group() for paragraph in prose for match in _SENTENCE.finditer(paragraph))
        return tuple(sentence for sentence in found if least <= len(sentence) <= most)

    def _paragraph(self, number: int) -> str:
        return self.paragraphs[number % len(self.paragraphs)]


def english() -> Corpus:
    """Return the text of Python's reference."""
    from pydoc_data.topics import topics

    known: set[str] = set()
    paragraphs = []
    for _, text in sorted(topics.items()):
        for paragraph in (part.strip("\n") for part in text.split(GAP)):
            if paragraph and paragraph not in known and len(paragraph) <= MOST_CHARACTERS:
                paragraphs.append(paragraph)
                if len(paragraph) >= REPEATED_CHARACTERS:
                    known.add(paragraph)
    return Corpus(tuple(paragraphs))


def question(sentence: str) -> str:
    """Return the query that stands behind a context."""
    return f"\n\nExplain this sentence with the text above: {sentence}\n"


def filled(events: Iterable[Event], corpus: Corpus) -> tuple[Event, ...]:
    """Return a trace with texts of about the length where it has numbers of tokens only.

    A segment of the same name and length has the same text in all updates of all contexts, as a document has; what is
    appended has a text of its own.
    """
    found: list[Event] = []
    for number, event in enumerate(events):
        match event:
            case Append():
                found.append(replace(event, text=_text(corpus, f"{event.context}/{number}", event.text)))
            case Update() | Replace():
                segments = tuple(
                    Segment(part.segment, _text(corpus, part.segment, part.text)) for part in event.segments
                )
                found.append(replace(event, segments=segments))
            case _:
                found.append(event)
    return tuple(found)


def _text(corpus: Corpus, name: str, text: Text) -> Text:
    if not isinstance(text, Tokens):
        return text
    return corpus.excerpt(zlib.crc32(name.encode()), round(text.number * CHARACTERS_PER_TOKEN)) if text.number else ""
