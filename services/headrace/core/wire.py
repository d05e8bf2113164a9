"""Translate between the messages of proto/headrace/v1 and the values of this package.

Readers tolerate newer peers: unknown fields are ignored, an unknown finish reason still ends an
answer and an unknown error is an InternalError that names the code.
"""

import math

from headrace.core.block import HASH_BYTES, BlockHash, KvLayout
from headrace.core.context import ContextState
from headrace.core.holder import Holder
from headrace.core.placement import Origin, Provenance, Tier
from headrace.core.put_facts import PutFacts
from headrace.core.request import (
    CachedPrefix,
    FinishReason,
    Piece,
    Revision,
    SamplingParams,
    SequenceId,
    SequenceSpec,
    Token,
    Usage,
)
from headrace.errors import ContextOverflow, HeadraceError, InternalError, InvalidRequest, PeerMismatch, by_code
from headrace.v1 import block_pb2, errors_pb2, generate_pb2, ingestor_pb2, kvstore_pb2, pool_pb2, router_pb2

SHOWN_LEASE_CHARS = 8
"""Of the 32 that a lease's id has: 96 bits are left to guess."""

_FINISH_TO_PROTO = {
    None: generate_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: generate_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generate_pb2.FINISH_REASON_LENGTH,
}
_FINISH_FROM_PROTO = {number: reason for reason, number in _FINISH_TO_PROTO.items()}


def sampling_to_proto(params: SamplingParams) -> generate_pb2.SamplingParams:
    """Write sampling parameters; every field that has presence is set, except None."""
    return generate_pb2.SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        seed=params.seed,
        logprobs=params.logprobs,
    )


def sampling_from_proto(message: generate_pb2.SamplingParams) -> SamplingParams:
    """Read sampling parameters; absent fields take the defaults that the proto file states.

    An absent seed reads as 0 and `max_tokens` 0 stays 0: whoever must tell these apart asks the message.
    """
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k if message.HasField("top_k") else None,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        seed=message.seed,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def spec_to_proto(spec: SequenceSpec) -> generate_pb2.SequenceSpec:
    """Write a sequence."""
    return generate_pb2.SequenceSpec(
        sequence_id=spec.sequence_id,
        model=spec.model,
        prompt_token_ids=spec.prompt,
        output_token_ids=spec.output,
        sampling=sampling_to_proto(spec.sampling),
        choice=spec.choice,
        deadline_unix_ms=spec.deadline_unix_ms,
        cache_key=spec.cache_key,
        sources=map(_source_to_proto, spec.sources),
        tenant=spec.tenant,
    )


def revision_to_proto(revision: Revision) -> generate_pb2.ContextRevision:
    """Write a revision."""
    return generate_pb2.ContextRevision(
        version=revision.version,
        kept_tokens=revision.num_kept,
        token_ids=revision.tokens,
        final_tokens=revision.num_final,
        is_closed=revision.is_closed,
    )


def revision_from_proto(message: generate_pb2.ContextRevision) -> Revision:
    """Read a revision."""
    return Revision(
        version=message.version,
        num_kept=message.kept_tokens,
        tokens=tuple(message.token_ids),
        num_final=message.final_tokens,
        is_closed=message.is_closed,
    )


def spec_from_proto(message: generate_pb2.SequenceSpec) -> SequenceSpec:
    """Read a sequence."""
    return SequenceSpec(
        sequence_id=SequenceId(message.sequence_id),
        model=message.model,
        prompt=tuple(message.prompt_token_ids),
        output=tuple(message.output_token_ids),
        sampling=sampling_from_proto(message.sampling),
        choice=message.choice,
        deadline_unix_ms=message.deadline_unix_ms,
        cache_key=message.cache_key,
        sources=tuple(source for each in message.sources if (source := _source_from_proto(each)) is not None),
        tenant=message.tenant,
    )


def token_to_proto(token: Token) -> generate_pb2.TokenEvent:
    """Write a token."""
    event = generate_pb2.TokenEvent(
        cursor=token.cursor,
        token_id=token.token_id,
        logprob=token.logprob,
        finish_reason=finish_to_proto(token.finish),
    )
    for token_id, logprob in token.top_logprobs:
        event.top_logprobs.add(token_id=token_id, logprob=logprob)
    return event


def token_from_proto(event: generate_pb2.TokenEvent) -> Token:
    """Read a token."""
    top = event.top_logprobs
    return Token(
        cursor=event.cursor,
        token_id=event.token_id,
        logprob=event.logprob if event.HasField("logprob") else None,
        # An empty generator costs as much as all the rest, for every token of every answer.
        top_logprobs=tuple((entry.token_id, entry.logprob) for entry in top) if top else (),
        finish=finish_from_proto(event.finish_reason),
    )


def context_state_to_proto(state: ContextState) -> ingestor_pb2.ContextState:
    """Write how far a context is."""
    return ingestor_pb2.ContextState(
        applied_sequence=state.applied,
        checkpoint_sequence=state.checkpoint,
        prompt_tokens=state.num_tokens,
        computed_tokens=state.num_computed,
        is_closed=state.is_closed,
        num_segments=state.num_segments,
    )


def context_state_from_proto(message: ingestor_pb2.ContextState) -> ContextState:
    """Read how far a context is."""
    return ContextState(
        applied=message.applied_sequence,
        checkpoint=message.checkpoint_sequence,
        num_tokens=message.prompt_tokens,
        num_computed=message.computed_tokens,
        is_closed=message.is_closed,
        num_segments=message.num_segments,
    )


def finish_to_proto(finish: FinishReason | None) -> "generate_pb2.FinishReason.ValueType":
    """Write why an answer ended; None is "not ended"."""
    return _FINISH_TO_PROTO[finish]


def finish_from_proto(finish: "generate_pb2.FinishReason.ValueType") -> FinishReason | None:
    """Read why an answer ended; a reason that only newer peers know reads as STOP, for it has ended."""
    return _FINISH_FROM_PROTO.get(finish, FinishReason.STOP)


def usage_to_proto(usage: Usage) -> generate_pb2.Usage:
    """Write token counts."""
    return generate_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def usage_from_proto(message: generate_pb2.Usage) -> Usage:
    """Read token counts."""
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
    )


def piece_to_proto(piece: Piece, request_id: str, model: str = "") -> router_pb2.GenerateResponse:
    """Write a piece of an answer.

    Args:
        piece: What to write.
        request_id: Name of the request.
        model: Name of the model; given with the first piece only.
    """
    return router_pb2.GenerateResponse(
        request_id=request_id,
        choice=piece.choice,
        text=piece.text,
        events=[token_to_proto(token) for token in piece.tokens],
        finish_reason=finish_to_proto(piece.finish),
        usage=None if piece.usage is None else usage_to_proto(piece.usage),
        model=model,
    )


def piece_from_proto(message: router_pb2.GenerateResponse) -> Piece:
    """Read a piece of an answer."""
    return Piece(
        choice=message.choice,
        text=message.text,
        tokens=tuple(token_from_proto(event) for event in message.events),
        finish=finish_from_proto(message.finish_reason),
        usage=usage_from_proto(message.usage) if message.HasField("usage") else None,
    )


def layout_to_proto(layout: KvLayout) -> block_pb2.KvLayout:
    """Write a block layout."""
    return block_pb2.KvLayout(
        num_layers=layout.num_layers,
        block_tokens=layout.block_tokens,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        block_bytes=layout.block_bytes,
    )


def layout_from_proto(message: block_pb2.KvLayout) -> KvLayout:
    """Read a block layout.

    Raises:
        PeerMismatch: the element type is unknown, or the size is not the product of the fields:
            the peer lays out its blocks in a way this process would misread.
    """
    layout = KvLayout(
        num_layers=message.num_layers,
        block_tokens=message.block_tokens,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        dtype=message.dtype,
    )
    try:
        block_bytes = layout.block_bytes
    except KeyError:
        raise PeerMismatch(f"peer has KV blocks of type {message.dtype!r}, unknown here", field="dtype") from None
    if message.block_bytes != block_bytes:
        raise PeerMismatch(
            f"peer's blocks have {message.block_bytes} bytes where its layout gives {block_bytes}", field="block_bytes"
        )
    return layout


def error_to_detail(error: HeadraceError, worker: str = "") -> errors_pb2.ErrorDetail:
    """Write an error.

    Args:
        error: What to write.
        worker: Name of this process; used unless the error already names the one that raised it.
    """
    wait_ms = None if error.retry_after_s is None else round(error.retry_after_s * 1000, 6)  # 2.007 s is 2007 ms.
    return errors_pb2.ErrorDetail(
        code=error.code,
        message=error.message,
        field=error.field or "",
        limit=error.limit or "",
        # 0 means "a retry would not help", so a retry that may come at once asks for 1 ms.
        retry_after_ms=0 if wait_ms is None else max(1, math.ceil(wait_ms)),
        worker=error.worker or worker,
        num_tokens=error.num_tokens if isinstance(error, ContextOverflow) else 0,
    )


def error_from_detail(detail: errors_pb2.ErrorDetail) -> HeadraceError:
    """Read an error of the class its code names; an unknown code is an InternalError that says it."""
    kind = by_code().get(detail.code)
    error = (kind or InternalError)(
        message=detail.message if kind else f"{detail.message} (unknown error code {detail.code!r})",
        field=detail.field or None,
        limit=detail.limit or None,
        retry_after_s=detail.retry_after_ms / 1000 if detail.retry_after_ms else None,
        worker=detail.worker or None,
    )
    if isinstance(error, ContextOverflow):
        error.num_tokens = detail.num_tokens
    return error


def holder_to_proto(holder: Holder, now_s: float) -> pool_pb2.LeaseReport:
    """Write who holds blocks; of the lease's id only so much that it cannot be used."""
    report = pool_pb2.LeaseReport(
        lease=holder.lease_id[:SHOWN_LEASE_CHARS],
        owner=holder.owner,
        reader=holder.reader,
        epoch=holder.epoch,
        num_blocks=holder.num_blocks,
        is_writer=holder.deadline_s is None,
    )
    if holder.deadline_s is not None and holder.deadline_s < float("inf"):
        report.remaining_ms = max(0, int((holder.deadline_s - now_s) * 1000))
    return report


def _source_to_proto(source: CachedPrefix) -> generate_pb2.CachedPrefix:
    return generate_pb2.CachedPrefix(
        location=source.location,
        address=source.address,
        tier=block_pb2.Tier.ValueType(source.tier),
        start_block=source.start,
        end_block=source.end,
    )


def _source_from_proto(message: generate_pb2.CachedPrefix) -> CachedPrefix | None:
    """Read a source; one in a tier that this version does not know is no source."""
    try:
        tier = Tier(message.tier)
    except ValueError:
        return None
    return CachedPrefix(
        location=message.location,
        address=message.address,
        tier=tier,
        start=message.start_block,
        end=message.end_block,
    )


def write_facts(request: kvstore_pb2.ReservePutRequest, facts: PutFacts) -> None:
    """Write what is said of the blocks of a put."""
    request.tenant = facts.tenant
    request.num_blocks_before = facts.num_blocks_before
    request.provenance = block_pb2.Provenance.ValueType(facts.origin.provenance)
    request.policy_id = facts.origin.policy_id
    request.segment_key = facts.segment_key or b""
    request.parent_hash = facts.parent or b""


def read_facts(request: kvstore_pb2.ReservePutRequest) -> PutFacts:
    """Read what is said of the blocks of a put.

    Raises:
        InvalidRequest: the provenance is not known, or a hash has another size.
    """
    try:
        provenance = Provenance(request.provenance or Provenance.EXACT)
    except ValueError:
        raise InvalidRequest(f"provenance {request.provenance} is not known", field="provenance") from None
    for field, name in (("segment_key", request.segment_key), ("parent_hash", request.parent_hash)):
        if len(name) not in (0, HASH_BYTES):
            raise InvalidRequest(f"{field} is a block hash of {HASH_BYTES} bytes", field=field)
    return PutFacts(
        tenant=request.tenant,
        num_blocks_before=request.num_blocks_before,
        origin=Origin(provenance=provenance, policy_id=request.policy_id),
        segment_key=BlockHash(request.segment_key) if request.segment_key else None,
        parent=BlockHash(request.parent_hash) if request.parent_hash else None,
    )
