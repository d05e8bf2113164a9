"""The HTTP front door before a real ingestor, and what tests of contexts do with it."""

import asyncio
import itertools

import pytest

from headrace.clock import VirtualClock
from headrace.router.http.app import create_app
from headrace.router.ingestors import Ingestors
from headrace.router.workers import Worker, WorkerTable
from headrace.runtime.channels import Channels
from headrace.testing.frontend import say
from headrace.testing.ingestor import open_ingestor, serve_frontend
from headrace.v1 import cluster_pb2

CONTEXTS = "/v1/contexts"
PATIENCE_S = 10.0


def _speaks_of_its_prompt(request):
    """Play an answer that is another one for another prompt, with a piece that shows nothing."""
    return say(f"{len(request.prompt)}:", "ü", "", str(sum(request.prompt)), ".", cached_tokens=3)(request)


@pytest.fixture
def limits():
    """Settings of the ingestor; tests override them."""
    return {}


@pytest.fixture
def clock():
    """Of the ingestor; tests override it with one that they advance."""
    return None


@pytest.fixture(scope="module")
def cuts(text):
    return text.cuts()


@pytest.fixture
async def ingestor(text, cuts, frontend, clock, limits):
    frontend.script = _speaks_of_its_prompt
    async with (
        serve_frontend(frontend) as router,
        open_ingestor(text, [router.address], cuts=cuts, clock=clock, **limits) as ingestor,
    ):
        yield ingestor


@pytest.fixture
def may_go_on(frontend, ingestor):
    """Makes answers stop behind their first piece until it is set."""
    is_set = asyncio.Event()

    def script(request):
        first, *rest = _speaks_of_its_prompt(request)
        return [first, is_set, *rest]

    frontend.script = script
    return is_set


class Watched(Ingestors):
    """Calls ingestors; lets a test hold back what is written to them, and see what is heard of them.

    Attributes:
        gate: Awaited before every request.
        heard: Responses that were taken in.
        calls: Those of each call.
        changed: Set, and replaced, at each.
    """

    def __init__(self, table, channels):
        super().__init__(table, channels, ())
        self.gate = self._let_pass
        self.heard = []
        self.calls = []
        self.changed = asyncio.Event()

    async def _let_pass(self, request):
        pass

    def begin(self, address, tenant, timeout_s):
        return _WatchedCall(super().begin(address, tenant, timeout_s), self)

    async def until(self, is_so):
        async with asyncio.timeout(PATIENCE_S):
            while not is_so(self.heard):
                await self.changed.wait()


class _WatchedCall:
    def __init__(self, call, watch):
        self._call, self._watch, self._heard = call, watch, []
        watch.calls.append(self._heard)
        self.cancel = call.cancel

    async def write(self, request):
        await self._watch.gate(request)
        await self._call.write(request)

    async def __aiter__(self):
        async for response in self._call:
            self._watch.heard.append(response)
            self._heard.append(response)
            self._watch.changed.set()
            self._watch.changed = asyncio.Event()
            yield response


@pytest.fixture
async def ingestors(ingestor):
    async with Channels() as channels:
        table = WorkerTable(name="router", addresses=(), channels=channels, clock=VirtualClock(), report_timeout_s=1.0)
        table.members[ingestor.address] = Worker(
            address=ingestor.address,
            identity=cluster_pb2.HandshakeResponse(name="ingestor", role=cluster_pb2.ROLE_INGESTOR),
            load=cluster_pb2.LoadReport(is_ready=True),
            is_connected=True,
        )
        yield Watched(table, channels)


@pytest.fixture
def app(frontend, settings, ingestors):
    bits = itertools.count(1)
    return create_app(
        frontend,
        clock=VirtualClock(1000.0),
        metrics=lambda: b"",
        settings=settings,
        entropy=lambda: next(bits),
        ingestors=ingestors,
    )


class Api:
    """What a client of contexts says and hears.

    Attributes:
        url: Of all contexts.
    """

    def __init__(self, http):
        self.url = CONTEXTS
        self._http = http

    async def open(self, headers=None, **body):
        """Open a context and return its URL."""
        response = await self._http.post(CONTEXTS, json=body, headers=headers)
        assert response.status_code == 200, response.text
        return f"{CONTEXTS}/{response.json()['id']}"

    async def append(self, url, text, **fields):
        """Append to a context and return how far it is."""
        response = await self._http.post(f"{url}/append", json={"text": text, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    @staticmethod
    def error_of(response, status):
        """Return the error of a response, after checking its status and that it has OpenAI's form."""
        assert response.status_code == status, response.text
        body = response.json()
        assert list(body) == ["error"]
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return body["error"]

    @staticmethod
    async def until(condition, what):
        """Wait for what only another task tells."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not condition():  # noqa: ASYNC110 calls that end far away set no event here
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(what) from None


@pytest.fixture
def api(http):
    return Api(http)
