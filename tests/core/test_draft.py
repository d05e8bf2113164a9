"""A request on the wire says what its client said, and nothing of what it left open."""

import pytest

from headrace.core.draft import draft_from_proto
from headrace.core.tenancy import Tenancy
from headrace.core.validate import RequestDraft, RequestLimits, build_request
from headrace.v1 import router_pb2

LIMITS = RequestLimits(model="m", max_context_tokens=100, vocab_size=1000)


def drafted(request, prompt=(1, 2)):
    return draft_from_proto(request, prompt, tenant="a", timeout_s=5.0, request_id="made", fresh_seed=7)


def built(draft):
    return build_request(draft, LIMITS, Tenancy(), now_unix_ms=0)


def test_what_is_left_open_is_as_if_nobody_had_asked_for_anything():
    request = router_pb2.GenerateRequest()
    request.sampling.temperature = 1.0  # which has no "not given" on the wire
    nothing = RequestDraft(request_id="made", prompt=(1, 2), fresh_seed=7, timeout_s=5.0, tenant="a")
    assert built(drafted(request)) == built(nothing)


def test_what_was_given_arrives():
    request = router_pb2.GenerateRequest(
        request_id="mine", num_choices=2, stop=["END"], cache_salt="s", cache_scope="tenant"
    )
    sampling = request.sampling
    sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p = 0.5, 3, 0.25, 0.125
    sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty = 1.5, 1.0, -1.0
    sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos, sampling.seed = 9, 2, True, 42
    sampling.logprobs = 4
    sampling.logit_bias[5] = 2.0
    sampling.stop_token_ids.append(8)
    wanted = RequestDraft(
        request_id="mine",
        prompt=(1, 2),
        fresh_seed=7,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        logit_bias={5: 2.0},
        max_tokens=9,
        min_tokens=2,
        stop_token_ids=(8,),
        ignore_eos=True,
        seed=42,
        logprobs=4,
        num_choices=2,
        stop=("END",),
        timeout_s=5.0,
        cache_salt="s",
        cache_scope="tenant",
        tenant="a",
    )
    assert drafted(request) == wanted


@pytest.mark.parametrize("field", ["seed", "logprobs", "top_k"])
def test_a_zero_that_was_given_is_not_the_same_as_nothing(field):
    request = router_pb2.GenerateRequest()
    assert getattr(drafted(request), field) is None
    setattr(request.sampling, field, 0)
    assert getattr(drafted(request), field) == 0
