"""The text of a context: segments in order, bytes into characters."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.core.context import Append, Replace
from headrace.errors import InvalidRequest

MAX_ID_CHARS = 128
MAX_CHARACTER_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentedText:
    """The segments of a context; immutable, so that a change that is refused leaves nothing behind.

    Attributes:
        text: Of all segments, one behind the other.
        ids: Of the segments, unique.
        starts: Where each begins in `text`.
        rest: First bytes of a character that the last segment was cut in.
    """

    text: str = ""
    ids: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()
    rest: bytes = b""

    def append(self, change: Append) -> "SegmentedText":
        """Return the text with more at its end.

        Raises:
            InvalidRequest: the segment is another than the last and not new, would begin inside a character, or the
                bytes are not UTF-8.
        """
        segment_id = change.segment_id or (self.ids[-1] if self.ids else "0")
        ids, starts = self.ids, self.starts
        if not ids or segment_id != ids[-1]:
            if self.rest:
                raise InvalidRequest(
                    f"segment {ids[-1]!r} ends inside a character: send its other bytes first", field="append.text"
                )
            ids, starts = (*ids, _fresh_id(segment_id, ids, "append.segment_id")), (*starts, len(self.text))
        text, rest = _decode(self.rest + change.text, "append.text", is_final=False)
        return SegmentedText(text=self.text + text, ids=ids, starts=starts, rest=rest)

    def replace(self, change: Replace) -> "SegmentedText":
        """Return the text with other segments from some segment on.

        Raises:
            InvalidRequest: there is no such segment, an id is empty or twice there, or bytes are not UTF-8.
        """
        first = 0 if change.from_segment_id is None else self._place(change.from_segment_id)
        ids, starts = list(self.ids[:first]), list(self.starts[:first])
        parts = [self.text[: self.starts[first]] if first < len(self.starts) else self.text if first else ""]
        end, known = len(parts[0]), set(ids)
        for index, segment in enumerate(change.segments):
            name = f"segments[{index}]"
            _fresh_id(segment.segment_id, known, f"{name}.id")
            text, _ = _decode(segment.text, f"{name}.text", is_final=True)
            ids.append(segment.segment_id)
            known.add(segment.segment_id)
            starts.append(end)
            parts.append(text)
            end += len(text)
        return SegmentedText(text="".join(parts), ids=tuple(ids), starts=tuple(starts))

    def whole(self) -> str:
        """Return the text of a context that ends here.

        Raises:
            InvalidRequest: it ends inside a character.
        """
        if self.rest:
            raise InvalidRequest("the context ends inside a character: send its other bytes", field="append.text")
        return self.text

    def _place(self, segment_id: str) -> int:
        try:
            return self.ids.index(segment_id)
        except ValueError:
            raise InvalidRequest("there is no such segment", field="replace.from_segment_id") from None


def _fresh_id(segment_id: str, known: "Sequence[str] | set[str]", field: str) -> str:
    if not 1 <= len(segment_id) <= MAX_ID_CHARS:
        limit = f"1 to {MAX_ID_CHARS} characters"
        raise InvalidRequest(f"the id of a segment must have {limit}", field=field, limit=limit)
    if segment_id in known:
        raise InvalidRequest("a segment of this id is there already; only the last one can be appended to", field=field)
    return segment_id


def _decode(found: bytes, field: str, *, is_final: bool) -> tuple[str, bytes]:
    """Return the characters of UTF-8 and the bytes of a last one that is not complete."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(found, final=is_final)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"byte {error.start} of the text is not UTF-8: {error.reason}", field=field) from None
    rest, _ = decoder.getstate()
    # Half of a surrogate pair, for which Python's decoder waits in vain: nothing that follows makes it a character.
    if rest[:1] == b"\xed" and rest[1:2] >= b"\xa0":
        raise InvalidRequest(f"byte {len(found) - len(rest)} of the text is not UTF-8: a surrogate", field=field)
    return text, rest
