"""Attention on a CPU with torch operations: decode rows in batches, prompt chunks one by one.

torch's fused CPU kernel takes keys with any stride between tokens and returns the log-sum-exp.
The query heads of a KV head go in as rows (decode) or as heads over a stride of 0 (chunks), so
grouped heads never copy the KV.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import cast

import torch
from torch.nn import functional

from headrace_kernels.attend import reference
from headrace_kernels.attend.merge import merge_attention_states
from headrace_kernels.attend.plan import AttendPlan, Scoring, visible_keys

# Rows of one decode batch are padded to the longest; a new batch starts beyond both limits
# (a batch costs about as much as 4 blocks of padding, Zen 3, 2 threads, 2026-11-21).
_PADDING_RATIO = 1.25
_PADDING_BLOCKS = 4

# With bf16 instructions torch compiles the fused kernel for every number of queries and keys that it meets, modulo its
# tiles, and keeps all of them for as long as the thread lives: 0.5 MB and 3 ms for each new pair (torch 2.13, 2-core
# Xeon, 2026-11-22). So chunks come in few sizes.
_QUERY_STEP = 16
_KEY_STEP = 64

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_HAS_NATIVE_BF16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def attend(
    q: torch.Tensor, q_positions: torch.Tensor, kv_view: torch.Tensor, plan: AttendPlan, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `headrace_kernels.attend.attend` for fp32 and bf16 on a CPU."""
    if scoring.soft_cap is not None:
        return reference.attend(q, q_positions, kv_view, plan, scoring)
    key = ("cpu parts", id(q_positions))
    if key not in plan.scratch:
        plan.scratch[key] = _parts(q_positions, plan, kv_view.shape[2])
    parts = cast("list[_Part]", plan.scratch[key])
    if len(parts) == 1 and isinstance(parts[0].rows, slice):
        return parts[0].attend(q, kv_view, scoring)
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    for part in parts:
        o[part.rows], lse[part.rows] = part.attend(q[part.rows], kv_view, scoring)
    return o, lse


class _Part:
    """Sequences attended in one call: one with any number of queries, or several with one each.

    Attributes:
        rows: Their queries in the packed batch.
    """

    def __init__(
        self,
        rows: Sequence[int],
        q_positions: torch.Tensor,
        blocks: torch.Tensor,
        lengths: list[int],
        slot_positions: torch.Tensor | None,
    ) -> None:
        """Derive indices.

        Args:
            rows: Rows of the packed batch.
            q_positions: `[tokens]` of the packed batch.
            blocks: `[sequences, blocks]`, long.
            lengths: Entries of each sequence.
            slot_positions: See AttendPlan.
        """
        consecutive = rows[-1] - rows[0] + 1 == len(rows)
        self.rows = slice(rows[0], rows[-1] + 1) if consecutive else torch.tensor(rows)
        self._step_positions = q_positions  # keeps the id in the scratch key from being given to another tensor
        self._q_positions = q_positions[self.rows].view(len(lengths), -1)
        self._blocks = blocks
        self._lengths = torch.tensor(lengths)
        self._length = max(lengths)
        self._is_ragged = min(lengths) < self._length
        self._key_positions = None if slot_positions is None else slot_positions[blocks].flatten(1)[:, : self._length]
        self._num_queries = self._q_positions.shape[1]
        self._index: dict[int, torch.Tensor] = {}
        self._unused: torch.Tensor | None = None
        self._masks: dict[tuple[int | None, int, torch.dtype], torch.Tensor | None] = {}

    def attend(self, q: torch.Tensor, kv_view: torch.Tensor, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend for the rows of this part, `q: [rows, heads, dim]`."""
        keys, values = self._gather(kv_view)
        window = scoring.window if scoring.window is not None and scoring.window < self._length else None
        if self._num_queries > 1 and window is None and self._key_positions is None:
            o, lse = _attend_last(q.to(keys.dtype), keys, values, scoring.scale)
            return o.to(q.dtype), lse
        mask_key = (window, scoring.sinks, keys.dtype)
        if mask_key not in self._masks:
            self._masks[mask_key] = self._mask(scoring, keys.dtype)
        mask = self._masks[mask_key]
        run = _attend_masked if self._num_queries > 1 else _attend_rows
        o, lse = run(q.to(keys.dtype), keys, values, mask, scoring.scale)
        if self._key_positions is not None and mask is not None:
            blind = mask.isneginf().all(dim=-1).view(-1, 1)
            o, lse = o.masked_fill(blind.unsqueeze(-1), 0), lse.masked_fill(blind, -torch.inf)
        return o.to(q.dtype), lse

    def _gather(self, kv_view: torch.Tensor) -> torch.Tensor:
        """Copy the part's blocks to `[2, sequences, length, kv_heads, dim]`, in the dtype to compute in.

        Keys and values are gathered by one `index_select` over rows of one block and one kind: it
        is three times as fast as indexing, and the rows of a layer are a constant stride apart.
        """
        num_blocks, _, block_tokens, heads, dim = kv_view.shape
        row = kv_view.stride(1)
        ratio = kv_view.stride(0) // row
        if ratio not in self._index:
            first = self._blocks.flatten() * ratio
            self._index[ratio] = torch.cat((first, first + 1))
            self._unused = self._unused_entries(block_tokens) if self._is_ragged else None
        rows = kv_view.as_strided(((num_blocks - 1) * ratio + 2, row), (row, 1))
        gathered = rows.index_select(0, self._index[ratio])
        if self._unused is not None:
            # A mask hides a key but does not survive NaN in it, and unused slots may hold anything.
            gathered.view(2, -1, heads * dim).index_fill_(1, self._unused, 0)
        gathered = gathered.view(2, self._blocks.shape[0], -1, heads, dim)[:, :, : self._length]
        return gathered if _HAS_NATIVE_BF16 else gathered.float()

    def _unused_entries(self, block_tokens: int) -> torch.Tensor:
        entries = torch.arange(self._blocks.shape[1] * block_tokens)
        return (entries >= self._lengths.unsqueeze(1)).flatten().nonzero().flatten()

    def _mask(self, scoring: Scoring, dtype: torch.dtype) -> torch.Tensor | None:
        """Return what to add to the scores, `[sequences, 1, queries, length]`; None hides only the causal triangle."""
        entries = torch.arange(self._length)
        hides_by_window = scoring.window is not None and scoring.window < self._length
        if self._key_positions is None and not hides_by_window:
            if self._num_queries == self._length or (self._num_queries == 1 and not self._is_ragged):
                return None
        key_positions = entries if self._key_positions is None else self._key_positions.unsqueeze(1)
        seen = visible_keys(self._q_positions, key_positions, scoring)
        seen &= entries < self._lengths.view(-1, 1, 1)
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf).unsqueeze(1)


def _attend_rows(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with one query per sequence: `q: [sequences, heads, dim]`, keys `[sequences, length, kv_heads, dim]`."""
    grouped = q.view(q.shape[0], keys.shape[2], -1, q.shape[2])
    kernel = _matmul_rows if q.dtype == torch.bfloat16 else _fused_rows
    o, lse = kernel(grouped, keys.transpose(1, 2), values.transpose(1, 2), mask, scale)
    return o.reshape(q.shape), lse.reshape(q.shape[:2])


def _fused_rows(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    o, lse = _fused(q, keys, values, 0.0, False, attn_mask=mask, scale=scale)
    return o, lse


def _matmul_rows(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with two matrix products: with bf16 instructions they read the KV at memory speed."""
    scores = torch.matmul(q * scale, keys.transpose(2, 3)).float()
    if mask is not None:
        scores += mask
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.softmax(scores, dim=-1).to(values.dtype)
    return torch.matmul(weights, values), lse


def _attend_masked(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend as `_attend_chunk`, in one of few sizes."""
    if mask is None:
        return _attend_last(q, keys, values, scale)
    spare_keys = -keys.shape[1] % _KEY_STEP
    mask = functional.pad(mask, (0, spare_keys), value=-torch.inf)
    mask = functional.pad(mask, (0, 0, 0, -q.shape[0] % _QUERY_STEP))
    keys, values = (_with_rows(part, 1, 0, spare_keys) for part in (keys, values))
    o, lse = _attend_chunk(_with_rows(q, 0, 0, mask.shape[2] - q.shape[0]), keys, values, mask, scale)
    return o[: q.shape[0]], lse[: q.shape[0]]


def _attend_last(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend as `_attend_chunk` with the last entries of a sequence as queries, in order.

    The entries before them are seen by all, so no mask is read and none of its scores is computed for nothing, and
    the heads that share keys are rows of one: 512 tokens after 3,584 take 6.5 instead of 8.6 ms a layer of SmolLM2
    (bf16, 2-core Xeon, 2026-11-22). What is over of a multiple of `_KEY_STEP` goes with the queries' own entries.
    """
    num_before = (keys.shape[1] - q.shape[0]) // _KEY_STEP * _KEY_STEP
    own = _attend_own(q, keys[:, num_before:], values[:, num_before:], scale)
    if not num_before:
        return own
    tokens, heads, dim = q.shape
    kv_heads = keys.shape[2]
    padded = _with_rows(q, 0, 0, -tokens % _QUERY_STEP)
    rows = padded.view(-1, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).reshape(kv_heads, 1, -1, dim)
    before = (part[:, :num_before].permute(2, 0, 1, 3) for part in (keys, values))
    o, lse = _fused(rows, *before, 0.0, False, attn_mask=None, scale=scale)
    o = o.view(kv_heads, -1, padded.shape[0], dim).permute(2, 0, 1, 3).reshape(-1, heads, dim)
    lse = lse.view(kv_heads, -1, padded.shape[0]).permute(2, 0, 1).reshape(-1, heads)
    return merge_attention_states(o[:tokens], lse[:tokens], *own)


def _attend_own(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend as `_attend_last` by the causal triangle alone: as many queries as keys, where nobody asks for the rest.

    The few sizes within one step stay as they are.
    """
    tokens, entries = q.shape[0], keys.shape[1]
    spare = -entries % _KEY_STEP if entries > _KEY_STEP else 0
    square = _with_rows(q, 0, entries - tokens, spare)
    keys, values = (_with_rows(part, 1, 0, spare) for part in (keys, values))
    o, lse = _attend_chunk(square, keys, values, None, scale)
    return o[entries - tokens : entries], lse[entries - tokens : entries]


def _attend_chunk(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with many queries of one sequence: `q: [tokens, heads, dim]`, keys `[1, length, kv_heads, dim]`."""
    tokens, heads, dim = q.shape
    _, length, kv_heads, _ = keys.shape
    shape = (kv_heads, heads // kv_heads, length, dim)
    o, lse = _fused(
        q.view(tokens, kv_heads, -1, dim).permute(1, 2, 0, 3),
        keys.permute(2, 0, 1, 3).expand(shape),
        values.permute(2, 0, 1, 3).expand(shape),
        0.0,
        mask is None,
        attn_mask=mask,
        scale=scale,
    )
    return o.permute(2, 0, 1, 3).reshape(q.shape), lse.permute(2, 0, 1).reshape(tokens, heads)


def _with_rows(x: torch.Tensor, axis: int, before: int, behind: int) -> torch.Tensor:
    """Return `x` with rows of zeros along an axis; itself if there are none."""
    if not before and not behind:
        return x
    return functional.pad(x, (0, 0) * (x.dim() - 1 - axis) + (before, behind))


def _parts(q_positions: torch.Tensor, plan: AttendPlan, block_tokens: int) -> list[_Part]:
    """Split a plan: sequences with one query by similar length, each other sequence alone."""
    starts, lengths = plan.cu_seqlens.tolist(), plan.kv_lengths.tolist()
    tables = plan.block_tables.long()
    num_blocks = [-(-length // block_tokens) for length in lengths]
    parts = []
    for members in _similar([b for b in range(len(lengths)) if starts[b + 1] - starts[b] == 1], num_blocks):
        blocks = tables[members, : max(num_blocks[b] for b in members)]
        rows = [starts[b] for b in members]
        parts.append(_Part(rows, q_positions, blocks, [lengths[b] for b in members], plan.slot_positions))
    for b in range(len(lengths)):
        if starts[b + 1] - starts[b] > 1:
            blocks = tables[b : b + 1, : num_blocks[b]]
            parts.append(_Part(range(starts[b], starts[b + 1]), q_positions, blocks, [lengths[b]], plan.slot_positions))
    return parts


def _similar(sequences: list[int], num_blocks: list[int]) -> list[list[int]]:
    """Group sequences whose tables are of similar length, each group in order."""
    bound, group = 0.0, 0
    keyed = []
    for b in sorted(sequences, key=lambda b: num_blocks[b]):
        if num_blocks[b] > bound:
            bound, group = max(num_blocks[b] * _PADDING_RATIO, num_blocks[b] + _PADDING_BLOCKS), group + 1
        keyed.append((group, b))
    return [sorted(b for _, b in members) for _, members in groupby(keyed, key=lambda pair: pair[0])]
