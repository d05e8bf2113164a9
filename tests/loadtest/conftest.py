"""What the tests of traces share: the modules, a loop with virtual time, and a fake of the SDK."""

import asyncio
import importlib
import os.path
import selectors
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from headrace.client.values import Answer, Choice
from headrace.core.context import ContextState
from headrace.core.request import FinishReason, Piece, Token

TRACES = Path(__file__).resolve().parents[2] / "loadtest" / "traces"


@pytest.fixture(scope="session")
def traces():
    """Return a function that imports a module of loadtest/traces."""

    def load(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "path", [str(TRACES), *sys.path])
            return importlib.import_module(name)

    return load


class _Selector(selectors.DefaultSelector):
    """Lets time pass in place of waiting."""

    now_s = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("everything waits for something that does not come")
            self.now_s += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that is always idle: its time is that of its next timer."""

    def __init__(self):
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self):
        return self._virtual.now_s


@pytest.fixture
def run():
    """Return a function that runs a coroutine in virtual time."""

    def in_virtual_time(coroutine):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(coroutine)

    return in_virtual_time


def utf8(text):
    return text.encode() if isinstance(text, str) else bytes(text)


class FakeAnswer:
    """Pieces as they come, and the whole answer."""

    def __init__(self, pieces):
        self._pieces = pieces
        self._text = ""

    def __aiter__(self):
        return self

    async def __anext__(self):
        piece = await anext(self._pieces)
        self._text += piece.text
        return piece

    async def answer(self):
        async for _ in self:
            pass
        choice = Choice(text=self._text, tokens=(), finish=FinishReason.LENGTH)
        return Answer(request_id="r", model="fake", choices=(choice,), usage=None, ttft_s=0.0, total_s=0.0)


class FakeContext:
    """Computes what it is sent at a fixed rate, and keeps the longest common prefix of an update."""

    model = "fake"
    max_context_tokens = 64

    def __init__(self, client, number):
        self._client = client
        self._number = number
        self._text = b""
        self._segments = []
        self._computed_at_s = 0.0
        self.is_over = False

    @property
    def context_id(self):
        return f"context-{self._number}"

    @property
    def state(self):
        return ContextState(num_segments=len(self._segments))

    async def watch(self):
        yield self.state

    def note(self, operation, *values):
        self._client.calls.append((round(asyncio.get_running_loop().time(), 6), self._number, operation, *values))
        error = self._client.errors.pop((self._number, operation), None)
        if error is not None:
            raise error

    async def append(self, text, segment=None):
        self.note("append", text, segment)
        await asyncio.sleep(self._client.call_s)
        last = self._segments[-1][0] if self._segments else "0"
        if segment in (None, last) and self._segments:
            self._set([*self._segments[:-1], (last, self._segments[-1][1] + utf8(text))])
        else:
            self._set([*self._segments, (segment or last, text)])

    async def replace(self, from_segment, segments):
        names = [name for name, _ in self._segments]
        self.note("replace", from_segment, list(segments))
        self._set([*self._segments[: names.index(from_segment)], *segments])

    async def update(self, segments):
        self.note("update", list(segments))
        self._set(list(segments))

    async def checkpoint(self):
        self.note("checkpoint")
        await self._computed()

    def close(self, query=""):
        return FakeAnswer(self._pieces(query))

    async def _pieces(self, query):
        self.note("close", query)
        self._becomes(self._text + query.encode())
        await self._computed()
        for cursor, word in enumerate(self._client.answer):
            yield Piece(choice=0, text=word, tokens=(Token(cursor=cursor, token_id=cursor),))
            await asyncio.sleep(self._client.token_s)
        self.is_over = True
        yield Piece(choice=0, text="", finish=FinishReason.LENGTH)

    async def abandon(self):
        self.note("abandon")
        self.is_over = True

    def _set(self, segments):
        self._segments = [(name, utf8(text)) for name, text in segments]
        self._becomes(b"".join(text for _, text in self._segments))

    def _becomes(self, text):
        added = len(text) - len(os.path.commonprefix([text, self._text]))
        begin_s = max(asyncio.get_running_loop().time(), self._computed_at_s)
        self._computed_at_s = begin_s + added * self._client.byte_s
        self._text = text

    async def _computed(self):
        await asyncio.sleep(max(0.0, self._computed_at_s - asyncio.get_running_loop().time()))


class FakeClient:
    """Opens contexts, numbered from 0, side by side.

    `calls` has what was called: time, number of the context, operation, values. `errors` maps a number and an
    operation to what it raises, once.
    """

    def __init__(self, *, byte_s=0.0, token_s=0.0, call_s=0.0, answer=("one", " two")):
        self.byte_s = byte_s
        self.token_s = token_s
        self.call_s = call_s
        self.answer = answer
        self.calls = []
        self.errors = {}
        self.num_open = 0
        self.most_open = 0
        self._number = 0

    @asynccontextmanager
    async def context(self, prefix="", *, chat=None, mode="append", **options):
        context = FakeContext(self, self._number)
        self._number += 1
        context.note("open", mode, prefix, chat, options)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            yield context
        finally:
            self.num_open -= 1
            if not context.is_over:
                context.note("left")

    async def generate(self, prompt):
        return prompt + "!"

    def operations(self, number):
        """Return names of the calls of one context."""
        return [call[2] for call in self.calls if call[1] == number]


@pytest.fixture
def fake_sdk():
    return FakeClient


@pytest.fixture
def script(monkeypatch, capsys):
    """Return a function that runs a module's main with arguments; it returns the exit code and what was written."""

    def run_main(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        code = 0
        try:
            module.main()
        except SystemExit as end:
            code = end.code
        written = capsys.readouterr()
        return code, written.out + written.err

    return run_main
