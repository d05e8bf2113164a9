"""An ingestor before a scripted router, for contexts of the SDK; gRPC runs over loopback."""

import asyncio
import contextlib

import pytest

from headrace import AsyncClient
from headrace.router.frontend import ServedModel
from headrace.testing.arrivals import WatchedFrontend
from headrace.testing.frontend import say
from headrace.testing.ingestor import open_ingestor, serve_frontend
from headrace.testing.text import byte_text_model

ANSWER = tuple("a long answer")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("headrace.ingestor.run.PAUSE_S", 0.01)
    monkeypatch.setattr("headrace.ingestor.call.LINGER_S", 0.05)
    monkeypatch.setattr("headrace.client.attempts.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("headrace.client.context.LINGER_S", 0.02)
    monkeypatch.setattr("headrace.ingestor.sessions.FULL_RETRY_S", 0.05)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return byte_text_model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def cuts(text):
    return text.cuts()


class Place:
    """An ingestor before a scripted router, and clients of it."""

    def __init__(self, stack, frontend, text):
        self.stack, self.frontend, self.text = stack, frontend, text
        self.ingestor = None

    async def restart(self):
        """Break all connections to the ingestor; its contexts stay."""
        await self.ingestor.start(await self.ingestor.break_off())

    @property
    def words(self):
        """What the router answers."""
        return list(ANSWER)

    @property
    def whole_answer(self):
        """What the router answers."""
        return "".join(ANSWER)

    async def client(self, **patience):
        return await self.stack.enter_async_context(
            AsyncClient(self.ingestor.address, **{"timeout_s": 20.0, "retries": 5, **patience})
        )

    def prompts(self):
        return [self.text.decode(request.prompt, skip_special=False) for request in self.frontend.requests]

    def hold(self, num_pieces):
        """Make the router wait behind the first pieces of its answer until it is told to go on."""
        go_on, script = asyncio.Event(), say(*ANSWER)

        def play(request):
            pieces = list(script(request))
            return [*pieces[:num_pieces], go_on, *pieces[num_pieces:]]

        self.frontend.script = play
        return go_on


@pytest.fixture
async def place(text, cuts, no_link_is_left):
    """Opens an ingestor; at the end nothing may be left of any context."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**settings):
            model = ServedModel(name="tiny", max_context_tokens=400, fingerprint="f" * 32, text=text)
            found = Place(stack, WatchedFrontend([model], say(*ANSWER)), text)
            router = await stack.enter_async_context(serve_frontend(found.frontend))
            found.ingestor = await stack.enter_async_context(
                open_ingestor(text, [router.address], cuts=cuts, **settings)
            )
            stack.callback(no_link_is_left)
            stack.push_async_callback(found.ingestor.at_rest)
            return found

        yield start


@pytest.fixture
def no_link_is_left():
    """Fails if a call of some context goes on."""

    def check():
        assert [task for task in asyncio.all_tasks() if "ContextLink" in repr(task.get_coro())] == []

    return check


@pytest.fixture
def drained():
    """Returns all items."""

    async def drain(items):
        return [item async for item in items]

    return drain
