"""A request on the wire as a draft to be checked."""

from collections.abc import Sequence

from headrace.core.validate import RequestDraft
from headrace.v1 import router_pb2


def draft_from_proto(
    request: router_pb2.GenerateRequest,
    prompt: Sequence[int],
    *,
    tenant: str,
    timeout_s: float | None,
    request_id: str,
    fresh_seed: int,
) -> RequestDraft:
    """Read what a client asks for.

    Args:
        request: Without regard to its prompt.
        prompt: Tokens of it.
        tenant: Checked name of who asks.
        timeout_s: Seconds to the deadline; None takes the default.
        request_id: Taken when the request names none.
        fresh_seed: 64 random bits, taken when the request has no seed.
    """
    sampling = request.sampling
    return RequestDraft(
        request_id=request.request_id or request_id,
        prompt=prompt,
        fresh_seed=fresh_seed,
        temperature=sampling.temperature,
        top_k=sampling.top_k if sampling.HasField("top_k") else None,
        top_p=sampling.top_p if sampling.HasField("top_p") else None,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else None,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        max_tokens=sampling.max_tokens or None,
        min_tokens=sampling.min_tokens,
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        seed=sampling.seed if sampling.HasField("seed") else None,
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        num_choices=request.num_choices or None,
        stop=tuple(request.stop),
        timeout_s=timeout_s,
        cache_salt=request.cache_salt or None,
        cache_scope=request.cache_scope or None,
        tenant=tenant,
    )
