"""Plays a trace to the SDK in real time, and takes the time from the close of each context to its answer.

Two ways: `streamed` passes each event on as it comes; `waited` sends nothing before the close, then all text at once
and the query, as a program does that knows no open contexts. The clock of a context starts when the close is due, in
both ways: it contains what calls before it were late by. That is the arrival of the last piece where the question comes
with it, as in crawls; in retrievals the last list stands for some three seconds before the close.

Run as a script it plays a trace in both ways in turn, each time under a cache salt of its own so that no run finds what
another has computed, and prints what each took and the ratios. Contexts that failed in one way or the other are in no
ratio; if there are any, or if nothing was answered in both ways, the exit code is 1.
"""

import argparse
import asyncio
import secrets
import statistics
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Unpack

import numpy as np
from arguments import at_least_one, positive
from contexts import (
    Abandon,
    Append,
    Bytes,
    Checkpoint,
    Close,
    Contents,
    Event,
    Open,
    Replace,
    Segment,
    Text,
    Tokens,
    TraceError,
    Update,
    by_context,
    read,
)
from corpus import english, filled
from sdk import AsyncContext, Client

from headrace import AsyncClient
from headrace.client.rpc import DEFAULT_ADDRESS
from headrace.client.values import GenerateOptions
from headrace.core.request import Piece
from headrace.errors import HeadraceError

TIMEOUT = "replay_timeout"
"""Failure of a context that had no answer in the replay's own time, in place of an error's code."""


class Way(Enum):
    """How contexts are sent."""

    STREAMED = "streamed"
    WAITED = "waited"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast a trace is played, and what ends it.

    Attributes:
        scale: Seconds that a second of the trace takes.
        most_contexts: Contexts at once. One more waits for an end, and all its times shift.
        answer_s: Longest time from a context's last event to the end of its answer.
    """

    scale: float = 1.0
    most_contexts: int = 256
    answer_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What came of one context.

    Attributes:
        context: Its name in the trace.
        late_s: Time that it waited for the end of others before it began.
        first_token_s: From when the close was due to the first token; None without an answer.
        total_s: From there to the end of the answer; None without one.
        output_tokens: Tokens of the answer.
        text: The answer; empty without one.
        end_s: From the trace's begin to its end.
        failure: Code of the error that ended it, or TIMEOUT; None when there was none.
    """

    context: str
    late_s: float
    first_token_s: float | None = None
    total_s: float | None = None
    output_tokens: int = 0
    text: str = ""
    end_s: float = 0.0
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A trace that was played.

    Attributes:
        played: Its contexts, in the order of their begin.
        makespan_s: From the trace's begin to the end of the last context.
    """

    way: Way
    played: tuple[Played, ...]
    makespan_s: float

    @property
    def failures(self) -> dict[str, int]:
        """Number of contexts by what ended them."""
        return dict(Counter(one.failure for one in self.played if one.failure is not None))

    @property
    def output_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(one.output_tokens for one in self.played)

    def first_token_s(self, percent: float) -> float:
        """Return the time to the first token that so many percent of the answers keep; NaN without answers."""
        times = [one.first_token_s for one in self.played if one.first_token_s is not None]
        return float(np.percentile(times, percent)) if times else float("nan")


async def replay(
    client: Client, events: Sequence[Event], way: Way, pace: Pace | None = None, **options: Unpack[GenerateOptions]
) -> Replay:
    """Play a trace; time is that of the running event loop. Cancelling abandons the open contexts.

    Args:
        client: Who opens the contexts.
        events: By their times, as `contexts.read` returns them, with texts everywhere.
        way: How contexts are sent.
        pace: How fast.
        options: Take the place of the trace's own.

    Raises:
        ValueError: events cannot follow each other, or a text is not known. A context that fails otherwise is counted.
    """
    contexts = [_Script.of(context) for context in by_context(events).values()]
    player = _Player(client, way, pace or Pace(), options)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(player.play(context)) for context in contexts]
    return Replay(way=way, played=tuple(task.result() for task in tasks), makespan_s=player.seconds())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Script:
    """What is done with one context.

    Attributes:
        events: Those behind the opening.
        segments: Names and texts at the close; none without one.
    """

    opening: Open
    events: tuple[Event, ...]
    segments: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, events: Sequence[Event]) -> "_Script":
        contents = Contents()
        for event in events:
            contents.apply(event)
            if _is_unknown(event):
                raise ValueError(f"a text of context {event.context!r} is not known: put one there with corpus.filled")
        opening, *others = events
        assert isinstance(opening, Open)
        is_closed = isinstance(events[-1], Close)
        return cls(opening=opening, events=tuple(others), segments=contents.segments() if is_closed else ())

    @property
    def close(self) -> Close | None:
        """The last event, if an answer follows it."""
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Close) else None

    @property
    def last_s(self) -> float:
        """Time of the last event in the trace."""
        return (self.events[-1] if self.events else self.opening).at_s


@dataclass(slots=True, kw_only=True)
class _Answer:
    """An answer so far; mutable."""

    due_s: float
    first_s: float | None = None
    last_s: float | None = None
    num_tokens: int = 0
    texts: list[str] = field(default_factory=list)

    async def take(self, pieces: AsyncIterator[Piece], now: Callable[[], float]) -> None:
        async for piece in pieces:
            if self.first_s is None and (piece.tokens or piece.text):
                self.first_s = now() - self.due_s
            self.num_tokens += len(piece.tokens)
            self.texts.append(piece.text)
        self.last_s = now() - self.due_s


class _Player:
    """Plays contexts side by side; owns the clock and the number of open ones."""

    def __init__(self, client: Client, way: Way, pace: Pace, options: GenerateOptions) -> None:
        self._client = client
        self._way = way
        self._pace = pace
        self._options = options
        self._slots = asyncio.Semaphore(pace.most_contexts)
        self._now = asyncio.get_running_loop().time
        self._begin_s = self._now()

    def seconds(self) -> float:
        """Return the time since the trace's begin."""
        return self._now() - self._begin_s

    async def play(self, script: _Script) -> Played:
        """Play one context to its end."""
        begins = script.opening if self._way is Way.STREAMED else script.close
        if begins is None:
            # Who waits for the whole context has nothing to send of one that never was whole.
            return Played(context=script.opening.context, late_s=0.0)
        await self._until(begins, 0.0)
        has_to_wait = self._slots.locked()
        async with self._slots:
            late_s = self._now() - self._due_s(begins, 0.0) if has_to_wait else 0.0
            return await self._timed(script, late_s)

    async def _timed(self, script: _Script, late_s: float) -> Played:
        due_s = self._begin_s + script.last_s * self._pace.scale + late_s
        answer = _Answer(due_s=due_s)
        try:
            async with asyncio.timeout_at(due_s + self._pace.answer_s):
                await (self._stream if self._way is Way.STREAMED else self._send)(script, late_s, answer)
        except HeadraceError as error:
            return Played(context=script.opening.context, late_s=late_s, end_s=self.seconds(), failure=error.code)
        except TimeoutError:
            return Played(context=script.opening.context, late_s=late_s, end_s=self.seconds(), failure=TIMEOUT)
        return Played(
            context=script.opening.context,
            late_s=late_s,
            first_token_s=answer.first_s,
            total_s=answer.last_s,
            output_tokens=answer.num_tokens,
            text="".join(answer.texts),
            end_s=self.seconds(),
        )

    async def _stream(self, script: _Script, late_s: float, answer: _Answer) -> None:
        async with self._open(script.opening) as context:
            for event in script.events:
                await self._until(event, late_s)
                if isinstance(event, Close):
                    await answer.take(context.close(event.query), self._now)
                else:
                    await _do(context, event)

    async def _send(self, script: _Script, late_s: float, answer: _Answer) -> None:
        close = script.close
        assert close is not None
        async with self._open(script.opening) as context:
            text = "".join(text for _, text in script.segments)
            if text:
                await (context.append(text) if script.opening.mode == "append" else context.update(script.segments))
            await answer.take(context.close(close.query), self._now)

    def _open(self, opening: Open) -> AbstractAsyncContextManager[AsyncContext]:
        options: GenerateOptions = {**opening.options, **self._options}
        return self._client.context(opening.prefix, chat=opening.chat, mode=opening.mode, **options)

    def _due_s(self, event: Event, late_s: float) -> float:
        return self._begin_s + event.at_s * self._pace.scale + late_s

    async def _until(self, event: Event, late_s: float) -> None:
        await asyncio.sleep(max(0.0, self._due_s(event, late_s) - self._now()))


def _is_unknown(event: Event) -> bool:
    match event:
        case Append():
            return isinstance(event.text, Tokens)
        case Update() | Replace():
            return any(isinstance(segment.text, Tokens) for segment in event.segments)
    return False


async def _do(context: AsyncContext, event: Event) -> None:
    match event:
        case Append():
            await context.append(_sent(event.text), event.segment)
        case Replace():
            await context.replace(event.from_segment, _pairs(event.segments))
        case Update():
            await context.update(_pairs(event.segments))
        case Checkpoint():
            await context.checkpoint()
        case Abandon():
            await context.abandon()
        case Open() | Close():
            raise AssertionError(event)


def _pairs(segments: Iterable[Segment]) -> list[tuple[str, str | bytes]]:
    return [(segment.segment, _sent(segment.text)) for segment in segments]


def _sent(text: Text) -> str | bytes:
    assert not isinstance(text, Tokens)
    return text.utf8 if isinstance(text, Bytes) else text


def summary(found: Replay) -> str:
    """Return a line about a replay."""
    p50_s, p95_s = found.first_token_s(50), found.first_token_s(95)
    late_s = max((one.late_s for one in found.played), default=0.0)
    return (
        f"{found.way.value}: first token after p50 {p50_s:.3f} s, p95 {p95_s:.3f} s; "
        f"makespan {found.makespan_s:.2f} s; {found.output_tokens:,} tokens; "
        f"latest begin {late_s:.2f} s late; failures {found.failures or 'none'}"
    )


def ratios(waited: Replay, streamed: Replay) -> dict[str, float]:
    """Return what streaming brings: times of waiting over those of streaming, and the share of the same answers.

    Contexts that failed in one of the ways are left out of both; empty if nothing was answered in both.
    """
    pairs = [
        (one, other)
        for one, other in zip(waited.played, streamed.played, strict=True)
        if one.failure is None and other.failure is None
    ]
    same = [one.text == other.text for one, other in pairs if one.total_s is not None and other.total_s is not None]
    if not same:
        return {}
    if len(pairs) < len(waited.played):
        waited, streamed = _only(waited, [one for one, _ in pairs]), _only(streamed, [other for _, other in pairs])
    return {
        "first token p50": waited.first_token_s(50) / streamed.first_token_s(50),
        "first token p95": waited.first_token_s(95) / streamed.first_token_s(95),
        "makespan": waited.makespan_s / streamed.makespan_s,
        "same answers": statistics.fmean(same),
    }


def _only(found: Replay, played: Sequence[Played]) -> Replay:
    return Replay(way=found.way, played=tuple(played), makespan_s=max(one.end_s for one in played))


def left_out(waited: Replay, streamed: Replay) -> str:
    """Return a line about the contexts that are in no ratio; empty if all are."""
    numbers = [sum(one.failure is not None for one in found.played) for found in (waited, streamed)]
    if not any(numbers):
        return ""
    either = sum(
        one.failure is not None or other.failure is not None
        for one, other in zip(waited.played, streamed.played, strict=True)
    )
    return f"left out of the ratios: {either} contexts; {numbers[0]} failed waited, {numbers[1]} streamed"


async def _compare(client: Client, events: Sequence[Event], pace: Pace, rounds: int) -> bool:
    """Print what came of the rounds; return whether no context failed and there are ratios."""
    found: list[dict[str, float]] = []
    has_failed = False
    for number in range(rounds):
        runs: dict[Way, Replay] = {}
        for way in list(Way)[:: -1 if number % 2 else 1]:
            runs[way] = await replay(client, events, way, pace, cache_salt=secrets.token_hex(8))
            print(summary(runs[way]))
        if line := left_out(runs[Way.WAITED], runs[Way.STREAMED]):
            has_failed = True
            print(line)
        found.append(ratios(runs[Way.WAITED], runs[Way.STREAMED]))
    rated = [one for one in found if one]
    if not rated:
        print("no ratios: no context was answered in both ways")
        return False
    for name in rated[0]:
        values = sorted(one[name] for one in rated)
        print(f"{name}: {statistics.median(values):.3f} ({values[0]:.3f} to {values[-1]:.3f} in {len(rated)} rounds)")
    return not has_failed


async def _play(address: str, events: Sequence[Event], pace: Pace, rounds: int) -> bool:
    longest_s = pace.answer_s + max(event.at_s for event in events) * pace.scale
    async with AsyncClient(address, timeout_s=longest_s) as client:
        return await _compare(client, events, pace, rounds)


def main() -> None:
    """Play a trace in both ways, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="of a router's gRPC server")
    parser.add_argument("--scale", type=positive, default=1.0, help="seconds that a second of the trace takes")
    parser.add_argument("--most-contexts", type=at_least_one, default=256)
    parser.add_argument("--answer-s", type=positive, default=600.0)
    parser.add_argument("--rounds", type=at_least_one, default=3)
    options = parser.parse_args()
    pace = Pace(scale=options.scale, most_contexts=options.most_contexts, answer_s=options.answer_s)
    try:
        events = read(options.trace)
    except TraceError as error:
        parser.error(str(error))
    if not events:
        parser.error(f"{options.trace}: the trace is empty")
    is_good = asyncio.run(_play(options.address, filled(events, english()), pace, options.rounds))
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
