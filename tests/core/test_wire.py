"""Translation to the wire and back loses nothing and tolerates newer peers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.block import BlockHash, KvLayout
from headrace.core.placement import Origin, Provenance, Tier
from headrace.core.put_facts import PutFacts
from headrace.core.request import (
    CachedPrefix,
    FinishReason,
    Piece,
    SamplingParams,
    SequenceId,
    SequenceSpec,
    Token,
    Usage,
)
from headrace.core.wire import (
    error_from_detail,
    error_to_detail,
    layout_from_proto,
    layout_to_proto,
    piece_from_proto,
    piece_to_proto,
    read_facts,
    sampling_from_proto,
    sampling_to_proto,
    spec_from_proto,
    spec_to_proto,
    token_from_proto,
    token_to_proto,
    write_facts,
)
from headrace.errors import (
    ContextOverflow,
    HeadraceError,
    InternalError,
    InvalidRequest,
    PeerMismatch,
    Saturated,
    by_code,
)
from headrace.v1 import errors_pb2, generate_pb2, kvstore_pb2, router_pb2

UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
REALS = st.floats(allow_nan=False)
TEXT = st.text()
TOKENS = st.builds(
    Token,
    cursor=UINT32,
    token_id=UINT32,
    logprob=st.none() | REALS,
    top_logprobs=st.lists(st.tuples(UINT32, REALS), max_size=3).map(tuple),
    finish=st.none() | st.sampled_from(FinishReason),
)
SAMPLING = st.builds(
    SamplingParams,
    temperature=REALS,
    top_k=st.none() | UINT32,
    top_p=REALS,
    min_p=REALS,
    repetition_penalty=REALS,
    presence_penalty=REALS,
    frequency_penalty=REALS,
    logit_bias=st.dictionaries(UINT32, REALS, max_size=3).map(lambda bias: tuple(sorted(bias.items()))),
    max_tokens=UINT32,
    min_tokens=UINT32,
    stop_token_ids=st.lists(UINT32, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    seed=UINT64,
    logprobs=st.none() | UINT32,
)
SOURCES = st.builds(CachedPrefix, location=TEXT, address=TEXT, tier=st.sampled_from(Tier), start=UINT32, end=UINT32)
SPECS = st.builds(
    SequenceSpec,
    sequence_id=TEXT.map(SequenceId),
    model=TEXT,
    prompt=st.lists(UINT32, max_size=5).map(tuple),
    output=st.lists(UINT32, max_size=5).map(tuple),
    sampling=SAMPLING,
    choice=UINT32,
    deadline_unix_ms=UINT64,
    cache_key=st.binary(max_size=8),
    sources=st.lists(SOURCES, max_size=2).map(tuple),
    tenant=st.text(max_size=8),
)
PIECES = st.builds(
    Piece,
    choice=UINT32,
    text=TEXT,
    tokens=st.lists(TOKENS, max_size=3).map(tuple),
    finish=st.none() | st.sampled_from(FinishReason),
    usage=st.none() | st.builds(Usage, prompt_tokens=UINT32, completion_tokens=UINT32, cached_tokens=UINT32),
)
ERRORS = st.builds(
    lambda kind, **values: kind(**values),
    st.sampled_from(sorted(by_code().values(), key=lambda kind: kind.code)),
    message=TEXT,
    field=st.none() | st.text(min_size=1),
    limit=st.none() | st.text(min_size=1),
    retry_after_s=st.none() | st.integers(1, 10**6).map(lambda ms: ms / 1000),
    worker=st.none() | st.text(min_size=1),
) | st.builds(ContextOverflow, message=TEXT, num_tokens=UINT32)
LAYOUT = KvLayout(num_layers=30, block_tokens=16, num_kv_heads=3, head_dim=64, dtype="bf16")


def values(error):
    return (type(error), vars(error))


@given(SAMPLING)
def test_sampling_comes_back_as_it_went(params):
    wired = generate_pb2.SamplingParams.FromString(sampling_to_proto(params).SerializeToString())
    assert sampling_from_proto(wired) == params


@given(SPECS)
def test_a_sequence_comes_back_as_it_went(spec):
    wired = generate_pb2.SequenceSpec.FromString(spec_to_proto(spec).SerializeToString())
    assert spec_from_proto(wired) == spec


@given(TOKENS)
def test_a_token_comes_back_as_it_went(token):
    wired = generate_pb2.TokenEvent.FromString(token_to_proto(token).SerializeToString())
    assert token_from_proto(wired) == token


@given(PIECES)
def test_a_piece_comes_back_as_it_went(piece):
    wired = router_pb2.GenerateResponse.FromString(piece_to_proto(piece, "r", "m").SerializeToString())
    assert piece_from_proto(wired) == piece
    assert (wired.request_id, wired.model) == ("r", "m")


@given(ERRORS)
def test_an_error_comes_back_as_it_went(error):
    wired = errors_pb2.ErrorDetail.FromString(error_to_detail(error).SerializeToString())
    assert values(error_from_detail(wired)) == values(error)


def test_every_error_class_has_a_code_of_its_own():
    raised = [kind for kind in by_code().values() if kind is not HeadraceError]
    assert {by_code()[kind.code] for kind in raised} == set(raised)
    assert by_code()["internal"] is InternalError


def test_an_empty_sampling_message_means_the_documented_defaults():
    params = sampling_from_proto(generate_pb2.SamplingParams())
    assert params == SamplingParams(temperature=0.0, max_tokens=0)


def test_an_unknown_error_code_is_an_internal_error_that_names_it():
    error = error_from_detail(errors_pb2.ErrorDetail(code="moon_phase", message="wrong moon"))
    assert isinstance(error, InternalError)
    assert "moon_phase" in error.message
    assert "wrong moon" in error.message


def test_a_retry_at_once_is_not_taken_for_no_retry():
    error = error_from_detail(error_to_detail(Saturated("full", retry_after_s=0.0)))
    assert error.retry_after_s == pytest.approx(0.001)


def test_an_error_keeps_the_name_of_the_process_that_raised_it():
    assert error_to_detail(Saturated("full"), worker="router").worker == "router"
    assert error_to_detail(Saturated("full", worker="decode-0"), worker="router").worker == "decode-0"


def test_an_unknown_finish_reason_still_ends_the_answer():
    event = generate_pb2.TokenEvent.FromString(b"\x28\x63")
    assert event.finish_reason == 99
    assert token_from_proto(event).finish is FinishReason.STOP


def test_unknown_fields_of_a_newer_peer_are_ignored():
    unknown_field_100 = b"\xa2\x06\x03new"
    wired = spec_to_proto(SequenceSpec(sequence_id=SequenceId("s"), model="m", prompt=(1,), deadline_unix_ms=1))
    newer = generate_pb2.SequenceSpec.FromString(wired.SerializeToString() + unknown_field_100)
    assert spec_from_proto(newer) == spec_from_proto(wired)


def test_a_layout_comes_back_as_it_went():
    assert layout_from_proto(layout_to_proto(LAYOUT)) == LAYOUT


@pytest.mark.parametrize(("field", "value"), [("dtype", "fp8"), ("block_bytes", 1), ("num_layers", 29)])
def test_a_layout_that_would_be_misread_is_refused(field, value):
    message = layout_to_proto(LAYOUT)
    setattr(message, field, value)
    with pytest.raises(PeerMismatch):
        layout_from_proto(message)


HASHES = st.none() | st.binary(min_size=16, max_size=16).map(BlockHash)


@given(
    st.builds(
        PutFacts,
        tenant=TEXT,
        num_blocks_before=UINT32,
        origin=st.builds(Origin, provenance=st.sampled_from(Provenance), policy_id=TEXT),
        segment_key=HASHES,
        parent=HASHES,
    )
)
def test_what_is_said_of_a_put_survives_the_wire(facts):
    request = kvstore_pb2.ReservePutRequest()
    write_facts(request, facts)
    assert read_facts(kvstore_pb2.ReservePutRequest.FromString(request.SerializeToString())) == facts


@pytest.mark.parametrize("field", ["parent_hash", "segment_key"])
def test_a_parent_or_key_of_a_put_that_is_no_hash_is_refused(field):
    with pytest.raises(InvalidRequest, match="16 bytes"):
        read_facts(kvstore_pb2.ReservePutRequest(**{field: b"short"}))


def test_an_unknown_provenance_of_a_put_is_refused():
    with pytest.raises(InvalidRequest, match="provenance 77"):
        read_facts(kvstore_pb2.ReservePutRequest(provenance=77))
