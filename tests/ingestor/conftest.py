import contextlib

import pytest

from headrace import AsyncClient
from headrace.router.frontend import ServedModel
from headrace.testing.frontend import ScriptedFrontend, say
from headrace.testing.ingestor import open_ingestor, serve_frontend
from headrace.testing.text import byte_text_model

NUM_CONTEXT_TOKENS = 400


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """The model of bytes: token 3 + b's place in the alphabet is byte b."""
    return byte_text_model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def frontend(text):
    model = ServedModel(name="tiny", max_context_tokens=NUM_CONTEXT_TOKENS, fingerprint="f" * 32, text=text)
    return ScriptedFrontend([model], say("a", "b", "c"))


@pytest.fixture
def prompt_of(text):
    """The text of what the router was asked to answer."""
    return lambda request: text.decode(request.prompt, skip_special=False)


@pytest.fixture
async def served(text, frontend):
    """Opens an ingestor before the scripted router, and a client of it."""
    async with contextlib.AsyncExitStack() as stack:

        async def serve(tenant=None, **settings):
            router = await stack.enter_async_context(serve_frontend(frontend))
            ingestor = await stack.enter_async_context(open_ingestor(text, [router.address], **settings))
            client = await stack.enter_async_context(AsyncClient(ingestor.address, tenant=tenant, timeout_s=20.0))
            return ingestor, client

        yield serve
