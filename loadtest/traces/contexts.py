"""Traces of contexts that arrive over time: their values, and the file that holds them.

The file has one event per line, as a JSON object, for many contexts at once; README.md has the format. Lines of one
context are in the order of their times, lines of different contexts may stand in any order: the reader sorts them.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from headrace.client.values import GenerateOptions, Message

Mode: TypeAlias = Literal["append", "update"]
"""As the SDK names them: text is only added at the end, or segments may also be replaced."""

FIRST_SEGMENT = "0"
"""Name of the segment that a first append without a name begins."""

MOST_S = 7 * 24 * 3600.0
"""No trace is longer: a time behind a week is in milliseconds, or since 1970."""

MOST_TOKENS = 1_000_000
"""Of a text of which only the length is known, since all of it is put there; the longest contexts have as many."""

MOST_NAME_CHARACTERS = 128
"""Of a segment's name, as the ingestor takes it (MAX_ID_CHARS)."""


class TraceError(ValueError):
    """A file is not a trace.

    Attributes:
        path: The file.
        line: Which of its lines is at fault, from 1; None when it is the whole file.
    """

    def __init__(self, path: Path, line: int | None, reason: str) -> None:
        super().__init__(f"{path}:{line}: {reason}" if line else f"{path}: {reason}")
        self.path = path
        self.line = line


class Tokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="tokens"):
    """Stands for a text of which only the number of tokens is known, MOST_TOKENS at most.

    `corpus.filled` puts a text there.
    """

    number: int

    def __post_init__(self) -> None:
        if not 0 <= self.number <= MOST_TOKENS:
            raise ValueError(f"a text has 0 to {MOST_TOKENS:,} tokens, not {self.number}")


class Bytes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="bytes"):
    """Text as UTF-8 that may be cut inside a character; base64 in the file."""

    utf8: bytes


Text: TypeAlias = str | Bytes | Tokens


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named part of a context; names are unique in it, not empty, and of MOST_NAME_CHARACTERS at most."""

    segment: str
    text: Text


class _Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="op"):
    """What happens to one context.

    Attributes:
        at_s: When, in seconds from the trace's begin, from 0 to MOST_S.
        context: Name of the context, unique in the trace and not empty.
    """

    at_s: float
    context: str

    def __post_init__(self) -> None:
        if not 0 <= self.at_s <= MOST_S:
            raise ValueError(f"no time from the trace's begin, 0 to {MOST_S:.0f} s: {self.at_s}")
        if not self.context:
            raise ValueError("the context has no name")


class Open(_Event, frozen=True, kw_only=True, tag="open"):
    """Begin a context.

    Attributes:
        prefix: Text before the context.
        chat: Messages before it, in place of the prefix.
        options: How to answer.
    """

    mode: Mode
    prefix: str = ""
    chat: tuple[Message, ...] | None = None
    options: GenerateOptions = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix and self.chat is not None:
            raise ValueError("a context has a prefix or a chat, not both")
        max_tokens = self.options.get("max_tokens")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}: an answer has at least one token")


class Append(_Event, frozen=True, kw_only=True, tag="append"):
    """Add text at the end, to the last segment or a new one; without a name to the last one."""

    text: Text
    segment: str | None = None


class Replace(_Event, frozen=True, kw_only=True, tag="replace"):
    """Replace a segment and all behind it; in update mode."""

    from_segment: str
    segments: tuple[Segment, ...]


class Update(_Event, frozen=True, kw_only=True, tag="update"):
    """Replace all segments; in update mode."""

    segments: tuple[Segment, ...]


class Checkpoint(_Event, frozen=True, kw_only=True, tag="checkpoint"):
    """Wait until all that was sent before is computed."""


class Close(_Event, frozen=True, kw_only=True, tag="close"):
    """End the context with the text that follows it, and be answered."""

    query: str = ""


class Abandon(_Event, frozen=True, kw_only=True, tag="abandon"):
    """Drop the context without an answer."""


Event: TypeAlias = Open | Append | Replace | Update | Checkpoint | Close | Abandon


def line_of(event: Event) -> bytes:
    """Return an event as a line of the file, without the line's end."""
    return msgspec.json.encode(event)


def event_of(line: bytes) -> Event:
    """Return the event of a line.

    Raises:
        ValueError: it is none.
    """
    try:
        event: Event = msgspec.json.decode(line, type=Event)
        found = json.loads(line.decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("an event is not so deep") from error
    # A TypedDict lets unknown keys pass.
    if isinstance(event, Open):
        if unknown := found.get("options", {}).keys() - GenerateOptions.__optional_keys__:
            raise ValueError(f"no options of a call: {', '.join(sorted(unknown))}")
        for message in found.get("chat") or ():
            if unknown := message.keys() - Message.__required_keys__:
                raise ValueError(f"a message has a role and a content, no {', '.join(sorted(unknown))}")
    return event


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object; raises ValueError for one that has a key twice."""
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def write(path: Path, events: Iterable[Event]) -> None:
    """Write a trace; a file that is there is replaced, unless an event cannot be written."""
    lines = [line_of(event) + b"\n" for event in events]
    with path.open("wb") as file:
        file.writelines(lines)


def read(path: Path) -> tuple[Event, ...]:
    """Return the events of a file by their times; a context that was cut off has no last one.

    Raises:
        TraceError: a line is no event, or cannot follow those of its context before it; the file cannot be read.
    """
    contexts: dict[str, Contents] = {}
    events = []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TraceError(path, None, f"cannot be read: {error.strerror}") from error
    # JSON escapes line ends, and bytes know no other ones than \n and \r.
    for number, line in enumerate(content.splitlines(), 1):
        try:
            event = event_of(line)
            contexts.setdefault(event.context, Contents()).apply(event)
        except ValueError as error:
            raise TraceError(path, number, str(error)) from error
        events.append(event)
    return in_order(events)


def in_order(events: Iterable[Event]) -> tuple[Event, ...]:
    """Return events by their times; those of the same time stay as they are."""
    return tuple(sorted(events, key=lambda event: event.at_s))


def by_context(events: Iterable[Event]) -> dict[str, list[Event]]:
    """Return each context's events, contexts by their first one."""
    contexts: dict[str, list[Event]] = {}
    for event in events:
        contexts.setdefault(event.context, []).append(event)
    return contexts


class Contents:
    """A context as its events leave it; mutable.

    Invariants: the first event opens it, none follows its end, times do not go back, names of segments are unique,
    and what is replaced is there.
    """

    def __init__(self) -> None:
        self._mode: Mode | None = None
        self._is_over = False
        self._at_s = 0.0
        self._parts: dict[str, list[Text]] = {}

    def apply(self, event: Event) -> None:
        """Change the context.

        Raises:
            ValueError: the event cannot follow those before it; nothing may follow it then.
        """
        self._check(event)
        self._at_s = event.at_s
        match event:
            case Open():
                self._mode = event.mode
            case Append():
                self._append(event)
            case Replace():
                self._replace(event.from_segment, event.segments)
            case Update():
                self._replace(None, event.segments)
            case Close():
                self._is_over = True
                for parts in self._parts.values():
                    _joined(_stand_in(part) for part in parts)
            case Abandon():
                self._is_over = True
            case Checkpoint():
                pass

    def segments(self) -> tuple[tuple[str, str], ...]:
        """Return names and texts of the segments.

        Raises:
            ValueError: one ends inside a character, or a text is not known.
        """
        return tuple((name, _joined(parts)) for name, parts in self._parts.items())

    def _check(self, event: Event) -> None:
        if isinstance(event, Open) is not (self._mode is None):
            raise ValueError(f"context {event.context!r} is " + ("not open yet" if self._mode is None else "open"))
        if self._is_over:
            raise ValueError(f"context {event.context!r} has ended")
        if event.at_s < self._at_s:
            raise ValueError(f"context {event.context!r} goes back in time, from {self._at_s} to {event.at_s} s")

    def _append(self, event: Append) -> None:
        last = next(reversed(self._parts), None)
        name = last or FIRST_SEGMENT if event.segment is None else event.segment
        if name != last:
            self._add(name)
        self._parts[name].append(event.text)

    def _replace(self, first: str | None, segments: Sequence[Segment]) -> None:
        if self._mode != "update":
            raise ValueError("segments are replaced in update mode only")
        if first is not None and first not in self._parts:
            raise ValueError(f"there is no segment {first!r}")
        names = list(self._parts)
        for name in names[0 if first is None else names.index(first) :]:
            del self._parts[name]
        for segment in segments:
            self._add(segment.segment)
            self._parts[segment.segment].append(segment.text)

    def _add(self, name: str) -> None:
        if not name:
            raise ValueError("a segment has no name")
        if len(name) > MOST_NAME_CHARACTERS:
            raise ValueError(f"a segment's name has {len(name)} characters, above {MOST_NAME_CHARACTERS}")
        if name in self._parts:
            raise ValueError(f"segment {name!r} is there already; only the last one grows")
        self._parts[name] = []


def _stand_in(part: Text) -> Text:
    """Return a short text for one of which only the length is known."""
    return "x" * min(1, part.number) if isinstance(part, Tokens) else part


def _joined(parts: Iterable[Text]) -> str:
    found = []
    for part in parts:
        match part:
            case str():
                found.append(part.encode())
            case Bytes():
                found.append(part.utf8)
            case Tokens():
                raise ValueError(f"only the length of a text is known, {part.number} tokens")
    return b"".join(found).decode()
