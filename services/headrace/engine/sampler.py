"""Logits to tokens."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headrace.core.request import SamplingParams

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """What the choice of one token depends on, beside its logits.

    Attributes:
        params: The request's parameters.
        choice: Index of the answer.
        position: Position that the new token will have.
        prompt: Prompt tokens.
        output: Tokens generated so far.
        eos_token_ids: Tokens that end an answer.
    """

    params: SamplingParams
    choice: int
    position: int
    prompt: Sequence[int]
    output: Sequence[int]
    eos_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A token, and the log-probabilities that were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Chosen]:
    """Choose one token per row.

    In this order: report log-probabilities of the raw logits; add logit bias; repetition penalty; presence
    and frequency penalties; forbid stop tokens before `min_tokens`; then greedy rows take the best token.
    Other rows: divide by the temperature; keep top-k, then top-p, then min-p; take
    `argmax(log p + gumbel(seed, choice, position, token))`, which draws from p. The noise is keyed by what it
    decides and not by when, so a row's token does not depend on its batch, its worker or a preemption.

    Args:
        logits: `[rows, vocab]`, fp32; not changed.
        rows: One per row of `logits`.
    """
    reports = [_report(logits[index], row.params.logprobs) for index, row in enumerate(rows)]
    edited = [index for index, row in enumerate(rows) if _has_edits(row)]
    if edited:
        logits = logits.clone()
        for index in edited:
            _edit(logits[index], rows[index])
    tokens = torch.argmax(logits, dim=-1).tolist()
    for index, row in enumerate(rows):
        if row.params.temperature > 0:
            tokens[index] = _draw(logits[index], row)
    return [_chosen(token, report) for token, report in zip(tokens, reports, strict=True)]


def gumbel(seed: int, choice: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    """Return standard Gumbel noise for tokens, the same on every device.

    The uniform number is a counter-based hash (two rounds of a 32-bit finalizer in 64-bit integers, whose
    products do not overflow), so any token's noise can be had alone.

    Args:
        seed: 64 bits.
        choice: Index of the answer.
        position: Position of the token.
        token_ids: `[n]`, int64.

    Returns:
        `[n]`, fp32.
    """
    key = _mix_int(seed & _MASK32)
    for word in (seed >> 32 & _MASK32, choice, position):
        key = _mix_int(key ^ _mix_int(word + 0x9E3779B9 & _MASK32))
    bits = _mix(_mix(token_ids ^ key) + (key >> 3) & _MASK32)
    uniform = (bits.to(torch.float64) + 0.5) / 2.0**32
    return (-torch.log(-torch.log(uniform))).to(torch.float32)


def _mix_int(value: int) -> int:
    value ^= value >> 16
    value = value * 0x7FEB352D & _MASK32
    value ^= value >> 15
    value = value * 0x846CA68B & _MASK32
    return value ^ value >> 16


def _mix(values: torch.Tensor) -> torch.Tensor:
    values = values ^ (values >> 16)
    values = _times(values, 0x7FEB352D)
    values = values ^ (values >> 15)
    values = _times(values, 0x846CA68B)
    return values ^ (values >> 16)


def _times(values: torch.Tensor, factor: int) -> torch.Tensor:
    """Multiply modulo 2**32: both factors are below 2**32 and the first is split, so that int64 suffices."""
    low = (values & 0xFFFF) * factor
    high = ((values >> 16) * factor & 0xFFFF) << 16
    return (low + high) & _MASK32


def _has_edits(row: SamplingRow) -> bool:
    params = row.params
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or len(row.output) < params.min_tokens
    )


def _edit(logits: torch.Tensor, row: SamplingRow) -> None:
    """Apply bias, penalties and the minimum length to one row, in place."""
    params = row.params
    device = logits.device
    if params.logit_bias:
        ids, addends = zip(*params.logit_bias, strict=True)
        logits[torch.tensor(ids, device=device)] += torch.tensor(addends, dtype=logits.dtype, device=device)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt, *row.output}), device=device)
        found = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(found > 0, found / penalty, found * penalty)
    if row.output and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(row.output)
        ids = torch.tensor(list(counts), device=device)
        amounts = torch.tensor(list(counts.values()), dtype=logits.dtype, device=device)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * amounts
    if len(row.output) < params.min_tokens:
        forbidden = sorted(row.eos_token_ids | set(params.stop_token_ids))
        if forbidden:
            logits[torch.tensor(forbidden, device=device)] = float("-inf")


def _draw(logits: torch.Tensor, row: SamplingRow) -> int:
    """Draw one token of one row."""
    params = row.params
    scaled = logits / params.temperature
    if params.top_k is not None and params.top_k < scaled.numel():
        kept, ids = torch.topk(scaled, params.top_k)
    elif params.top_p < 1.0:
        kept, ids = torch.sort(scaled, descending=True)
    else:
        kept, ids = scaled, torch.arange(scaled.numel(), device=scaled.device)
    if params.top_p < 1.0:
        probabilities = torch.softmax(kept, dim=-1)
        before = torch.cumsum(probabilities, dim=-1) - probabilities
        num_kept = max(1, int((before < params.top_p).sum()))
        kept, ids = kept[:num_kept], ids[:num_kept]
    if params.min_p > 0.0:
        likely = kept >= kept.max() + torch.log(torch.tensor(params.min_p, dtype=kept.dtype, device=kept.device))
        kept, ids = kept[likely], ids[likely]
    noise = gumbel(params.seed, row.choice, row.position, ids)
    return int(ids[torch.argmax(kept + noise)])


def _report(logits: torch.Tensor, num_top: int | None) -> tuple[torch.Tensor, int] | None:
    return None if num_top is None else (torch.log_softmax(logits.float(), dim=-1), num_top)


def _chosen(token: int, report: tuple[torch.Tensor, int] | None) -> Chosen:
    if report is None:
        return Chosen(token_id=token)
    logprobs, num_top = report
    values, ids = torch.topk(logprobs, num_top)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Chosen(token_id=token, logprob=float(logprobs[token]), top_logprobs=top)
