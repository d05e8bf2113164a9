import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.tenancy import Tenancy, tenant_key
from headrace.core.validate import RequestDraft, RequestLimits, build_request
from headrace.errors import ContextOverflow, InvalidRequest

TENANCY = Tenancy(secret=b"secret", public_tenants=("open",))
LIMITS = RequestLimits(model="m", max_context_tokens=100, vocab_size=1000)
INF, NAN = math.inf, math.nan


def build(**fields):
    values = {"request_id": "r", "prompt": [1, 2, 3], "fresh_seed": 7, **fields}
    return build_request(RequestDraft(**values), LIMITS, TENANCY, now_unix_ms=5_000)


def test_what_is_left_open_gets_openai_defaults_and_the_rest_of_the_context():
    request = build()
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, None, 0.0)
    assert (sampling.max_tokens, sampling.seed, sampling.logprobs) == (97, 7, None)
    assert (request.num_choices, request.stop, request.tenant) == (1, (), "default")
    assert request.cache_key == tenant_key(b"secret", "default", b"")
    assert request.deadline_unix_ms == 605_000


def test_given_values_arrive():
    request = build(
        temperature=0,
        top_k=5,
        top_p=0.5,
        logit_bias={3: -100, 4: 100},
        max_tokens=97,
        min_tokens=97,
        stop=["a", "b" * 256],
        num_choices=16,
        logprobs=20,
        stop_token_ids=[999],
        seed=-1,
        timeout_s=0.0015,
        cache_salt="é",
        tenant="a",
    )
    assert request.sampling.logit_bias == ((3, -100.0), (4, 100.0))
    assert request.sampling.seed == 2**64 - 1
    assert (request.stop, request.num_choices, request.deadline_unix_ms) == (("a", "b" * 256), 16, 5_002)
    assert (request.tenant, request.cache_key) == ("a", tenant_key(b"secret", "a", "é".encode()))


def test_the_public_scope_has_no_key_and_the_tenants_own_is_the_default():
    assert build(tenant="open", cache_scope="public").cache_key == b""
    assert build(tenant="open", cache_scope="tenant") == build(tenant="open")


def test_a_tenant_that_may_not_is_refused_the_public_scope():
    with pytest.raises(InvalidRequest, match="not allowed for tenant a"):
        build(tenant="a", cache_scope="public")


@pytest.mark.parametrize("top_k", [None, 0, -1])
def test_top_k_of_zero_or_minus_one_keeps_all(top_k):
    assert build(top_k=top_k).sampling.top_k is None


def test_a_default_of_tokens_shrinks_to_what_the_context_holds():
    assert build(default_max_tokens=16).sampling.max_tokens == 16
    assert build(default_max_tokens=16, prompt=[1] * 95).sampling.max_tokens == 5


BAD = [
    ("temperature", -0.1, "from 0 to 100"),
    ("temperature", 100.1, "from 0 to 100"),
    ("top_p", 0.0, "above 0"),
    ("top_p", 1.01, "at most 1"),
    ("top_k", -2, "from 1"),
    ("min_p", 1.1, "from 0 to 1"),
    ("min_p", -0.1, "from 0 to 1"),
    ("repetition_penalty", 0.0, "above 0"),
    ("repetition_penalty", 101.0, "at most 100"),
    ("presence_penalty", 2.1, "from -2 to 2"),
    ("frequency_penalty", -2.1, "from -2 to 2"),
    ("logit_bias", {1000: 1.0}, "0 to 999"),
    ("logit_bias", {-1: 1.0}, "0 to 999"),
    ("logit_bias", {1: 100.5}, "from -100 to 100"),
    ("logit_bias", {1: NAN}, "from -100 to 100"),
    ("logit_bias", dict.fromkeys(range(301), 0.0), "at most 300"),
    ("n", 0, "from 1 to 16"),
    ("n", 17, "from 1 to 16"),
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", -5, "at least 1"),
    ("max_tokens", 98, "100"),
    ("min_tokens", -1, "from 0 to 97"),
    ("min_tokens", 98, "from 0 to 97"),
    ("prompt", [], "at least 1 token"),
    ("prompt", [1000], "0 to 999"),
    ("prompt", [-1], "0 to 999"),
    ("prompt", [1] * 100, "99 tokens"),
    ("stop", [""], "1 to 256"),
    ("stop", ["x" * 257], "1 to 256"),
    ("stop", ["x"] * 17, "at most 16"),
    ("stop_token_ids", [1000], "0 to 999"),
    ("stop_token_ids", [1] * 129, "at most 128"),
    ("logprobs", -1, "from 0 to 20"),
    ("logprobs", 21, "from 0 to 20"),
    ("seed", 2**64, "from"),
    ("timeout", 0.0, "above 0"),
    ("timeout", -1.0, "above 0"),
    ("timeout", 3601.0, "at most 3600"),
    ("cache_salt", "x" * 257, "at most 256"),
    ("cache_scope", "mine", "tenant or public"),
    ("request_id", "", "1 to 128"),
    ("request_id", "a\nb", "1 to 128"),
]


@pytest.mark.parametrize(("field", "value", "limit"), BAD)
def test_a_value_out_of_range_is_refused_with_its_field_and_limit(field, value, limit):
    own = {"n": "num_choices", "timeout": "timeout_s"}.get(field, field)
    with pytest.raises(InvalidRequest) as caught:
        build(**{own: value})
    assert caught.value.field == field
    assert field in caught.value.message
    assert limit in (caught.value.limit or "")


FLOATS = [
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "timeout_s",
]


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_numbers_that_are_not_finite_are_refused(field, value):
    with pytest.raises(InvalidRequest):
        build(**{field: value})


def test_too_many_tokens_names_both_numbers_and_the_context():
    with pytest.raises(InvalidRequest) as caught:
        build(max_tokens=200)
    for number in ("3 tokens", "200", "100"):
        assert number in caught.value.message


@pytest.mark.parametrize("fields", [{"prompt": [1] * 100}, {"max_tokens": 98}], ids=["prompt", "answer"])
def test_a_prompt_and_an_answer_that_do_not_fit_are_an_overflow(fields):
    with pytest.raises(ContextOverflow):
        build(**fields)


def test_a_prompt_that_still_arrives_may_be_empty():
    draft = RequestDraft(request_id="r", prompt=(), fresh_seed=7)
    request = build_request(draft, LIMITS, TENANCY, now_unix_ms=5_000, is_open=True)
    assert (request.prompt, request.sampling.max_tokens) == ((), 100)


def test_fields_are_named_as_the_client_calls_them():
    with pytest.raises(InvalidRequest) as caught:
        build(max_tokens=0, names={"max_tokens": "max_completion_tokens"})
    assert caught.value.field == "max_completion_tokens"
    assert caught.value.message.startswith("max_completion_tokens")


@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(),
            "top_p": st.floats(),
            "min_p": st.floats(),
            "top_k": st.integers(),
            "seed": st.integers(),
            "max_tokens": st.integers(),
            "min_tokens": st.integers(),
            "num_choices": st.integers(),
            "prompt": st.lists(st.integers(-5, 1005), max_size=5),
            "stop": st.lists(st.text(max_size=3), max_size=3),
            "timeout_s": st.floats(),
            "logit_bias": st.dictionaries(st.integers(-5, 1005), st.floats(), max_size=3),
        },
    )
)
def test_whatever_is_asked_is_either_within_all_limits_or_refused(values):
    try:
        request = build(**values)
    except InvalidRequest:
        return
    sampling = request.sampling
    assert 0 <= sampling.temperature <= 100
    assert 0 < sampling.top_p <= 1
    assert sampling.top_k is None or sampling.top_k >= 1
    assert 0 <= sampling.seed < 2**64
    assert 1 <= sampling.max_tokens <= 100 - len(request.prompt)
    assert request.prompt
    assert all(request.stop)
    assert 5_000 < request.deadline_unix_ms <= 5_000 + 3_600_000
    assert all(-100 <= addend <= 100 for _, addend in sampling.logit_bias)


def test_every_sampling_field_has_a_draft_field():
    drafted = {field.name for field in dataclasses.fields(RequestDraft)}
    assert {field.name for field in dataclasses.fields(build().sampling)} <= drafted
