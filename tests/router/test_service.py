"""RouterService with a scripted front end and a real tokenizer: what gRPC callers may send."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from headrace.clock import VirtualClock
from headrace.core.tenancy import tenant_key
from headrace.errors import InvalidRequest
from headrace.router.config import RouterConfig
from headrace.router.frontend import ServedModel
from headrace.router.service import RouterServicer
from headrace.settings import Secret
from headrace.testing.frontend import ScriptedFrontend, say
from headrace.testing.text import byte_text_model
from headrace.text.model import TextModel
from headrace.v1 import router_pb2


def context(*tenants):
    return SimpleNamespace(
        time_remaining=lambda: 30.0,
        invocation_metadata=lambda: (("user-agent", "x"), *(("x-tenant-id", tenant) for tenant in tenants)),
    )


CONTEXT = context()
NUM_CONTEXT_TOKENS = 10_000


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return byte_text_model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def frontend(text):
    model = ServedModel(name="tiny", max_context_tokens=NUM_CONTEXT_TOKENS, fingerprint="f" * 32, text=text)
    return ScriptedFrontend([model], say("ok"))


@pytest.fixture
def servicer(frontend, tmp_path):
    config = RouterConfig(
        workers=("127.0.0.1:1",),
        model=tmp_path,
        max_body_bytes=1_000_000,
        cache_secret=Secret("secret"),
        public_tenants=("open",),
    )
    return RouterServicer(frontend, router_pb2.GetClusterResponse, config, VirtualClock(1000.0))


@pytest.fixture
def threads_of_encode(monkeypatch):
    """The threads that tokenized, in order."""
    found = []
    encode = TextModel.encode

    def noting(self, *args, **options):
        found.append(threading.current_thread())
        return encode(self, *args, **options)

    monkeypatch.setattr(TextModel, "encode", noting)
    return found


async def generate(servicer, where=CONTEXT, **fields):
    return [answer async for answer in servicer.Generate(router_pb2.GenerateRequest(model="tiny", **fields), where)]


async def test_a_short_prompt_is_tokenized_at_once_and_a_long_one_off_the_loop(servicer, threads_of_encode):
    await generate(servicer, text="ab")
    await generate(servicer, text="a" * 9_000)
    await servicer.Tokenize(router_pb2.TokenizeRequest(model="tiny", text="a" * 9_000), CONTEXT)
    here = threading.current_thread()
    assert [thread is here for thread in threads_of_encode] == [True, False, False]


@pytest.mark.parametrize(
    "prompt",
    [
        {"text": "a" * 900_000},
        {"chat": router_pb2.ChatPrompt(messages=[{"role": "user", "content": "a" * 900_000}])},
    ],
    ids=["text", "chat"],
)
async def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(servicer, threads_of_encode, prompt):
    with pytest.raises(InvalidRequest, match="has at least") as caught:
        await generate(servicer, **prompt)
    assert caught.value.field in ("prompt", "chat.messages")
    assert threads_of_encode == []


async def test_a_message_over_the_limit_of_http_bodies_is_refused(servicer):
    with pytest.raises(InvalidRequest, match="at most 1000000 are allowed"):
        await generate(servicer, text="a" * 1_000_001)
    with pytest.raises(InvalidRequest, match="at most 1000000 are allowed"):
        await servicer.Tokenize(router_pb2.TokenizeRequest(model="tiny", text="a" * 1_000_001), CONTEXT)


async def test_no_more_tokens_are_decoded_than_the_context_holds(servicer):
    with pytest.raises(InvalidRequest, match="at most 10000 tokens"):
        await servicer.Detokenize(router_pb2.DetokenizeRequest(model="tiny", token_ids=[1] * 10_001), CONTEXT)


async def test_other_calls_go_on_while_a_long_prompt_is_tokenized(servicer, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()

    def slow(self, text, **_):
        begun.set()
        may_end.wait(10)
        return [1] * 3

    monkeypatch.setattr(TextModel, "encode", slow)
    long = asyncio.create_task(generate(servicer, text="a" * 9_000))
    await asyncio.to_thread(begun.wait, 10)
    assert (await servicer.ListModels(router_pb2.ListModelsRequest(), CONTEXT)).models[0].name == "tiny"
    assert not long.done()
    may_end.set()
    assert await long


async def test_the_metadata_names_the_tenant(servicer, frontend):
    await generate(servicer, text="ab")
    await generate(servicer, context("team-a"), text="ab", cache_salt="s")
    await generate(servicer, context("open"), text="ab", cache_scope="public")
    assert [(request.tenant, request.cache_key) for request in frontend.requests] == [
        ("default", tenant_key(b"secret", "default", b"")),
        ("team-a", tenant_key(b"secret", "team-a", b"s")),
        ("open", b""),
    ]


@pytest.mark.parametrize(
    ("tenants", "scope", "field"),
    [
        (["a b"], "", "x-tenant-id"),
        ([""], "", "x-tenant-id"),
        (["a", "b"], "", "x-tenant-id"),
        (["closed"], "public", "cache_scope"),
        (["open"], "mine", "cache_scope"),
    ],
)
async def test_a_tenant_or_scope_that_is_not_allowed_is_refused(servicer, frontend, tenants, scope, field):
    with pytest.raises(InvalidRequest) as caught:
        await generate(servicer, context(*tenants), text="ab", cache_scope=scope)
    assert (caught.value.field, frontend.requests) == (field, [])
