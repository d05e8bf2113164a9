"""Batch -> tensors -> logits; no policy."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain

import torch

from headrace.core.block import BlockId, KvLayout, blocks_for
from headrace.engine.arena import KvArena
from headrace.engine.batch import Batch, BatchItem
from headrace.engine.models.decoder import StepInputs
from headrace.engine.models.loader import Model
from headrace.engine.packing import lay_out
from headrace.seams.pack import PackPolicy
from headrace_kernels.attend import AttendPlan
from headrace_kernels.write_kv import WritePlan, write_positions


class ModelRunner:
    """Runs a model over an arena; the items of a batch lie on one token axis, or in rows if a policy packs them.

    Not safe for several threads: a step writes the arena.
    """

    def __init__(
        self,
        model: Model,
        arena: KvArena,
        threads: Callable[[], int] | None = None,
        pack: PackPolicy | None = None,
    ) -> None:
        """Bind a model to its memory.

        Args:
            model: Weights and the computation over them.
            arena: Blocks of KV; written.
            threads: Asked in front of every layer how many threads to use; None leaves it to torch.
            pack: Lays prompt chunks out in rows of equal length; None computes no token that nobody asked for.

        Raises:
            ValueError: The arena has another layout than the model's KV, or no blocks for the pads of `pack`.
        """
        if arena.layout != model.kv_layout(arena.layout.block_tokens):
            raise ValueError(f"the arena holds {arena.layout}, the model writes {model.kv_layout()}")
        if pack is not None and not arena.pad_blocks:
            raise ValueError("rows of equal length need an arena with blocks for their pads; it has none")
        self._model = model
        self._arena = arena
        self._pack = pack
        self._threads = threads

    @property
    def layout(self) -> KvLayout:
        """How a block of the arena lies in memory."""
        return self._arena.layout

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self._model.spec.layers)

    @property
    def vocab_size(self) -> int:
        """Logits per sampled token."""
        return self._model.spec.vocab_size

    @property
    def max_context_tokens(self) -> int:
        """Most tokens of one sequence."""
        return self._model.spec.max_context_tokens

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self._model.spec.eos_token_ids

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """Compute a step; see `headrace.engine.batch.Runner.run`."""
        if not batch.items:
            return torch.empty((0, self.vocab_size), device=self._model.device)
        for item in batch.items:
            self._check(item)
        inputs = self._laid_out(batch.items)
        if batch.await_layer is not None:
            inputs = dataclasses.replace(inputs, await_layer=batch.await_layer)
        return self._model.decoder(inputs, self._arena.data, self._threads)

    def read_blocks(self, blocks: Sequence[BlockId]) -> torch.Tensor:
        """Return a copy of blocks; see `headrace.engine.batch.Runner.read_blocks`."""
        data = self._arena.data
        picked = data[self._long(blocks)]
        return picked.cpu().reshape(len(blocks), -1).view(torch.uint8)

    def write_blocks(self, blocks: Sequence[BlockId], data: torch.Tensor) -> None:
        """Overwrite blocks; see `headrace.engine.batch.Runner.write_blocks`."""
        arena = self._arena.data
        values = data.reshape(-1).view(arena.dtype).view(len(blocks), *arena.shape[1:])
        arena[self._long(blocks)] = values.to(arena.device)

    def _laid_out(self, items: tuple[BatchItem, ...]) -> StepInputs:
        if self._pack is None:
            return self._inputs(items)
        pad_table = self._arena.pad_blocks
        layout = lay_out(items, self._pack, pad_table, len(pad_table) * self.layout.block_tokens)
        return self._inputs(layout.items, layout.places)

    def _check(self, item: BatchItem) -> None:
        count, needed = len(item.token_ids), blocks_for(item.kv_length, self.layout.block_tokens)
        if not count or len(item.positions) != count or item.kv_start < 0:
            raise ValueError(f"item of {count} tokens, {len(item.positions)} positions, start {item.kv_start}")
        if len(item.block_table) < needed:
            raise ValueError(f"{item.kv_length} entries need {needed} blocks; the table has {len(item.block_table)}")
        if min(item.token_ids) < 0 or max(item.token_ids) >= self.vocab_size:
            raise ValueError(f"token ids must be in [0, {self.vocab_size})")
        if min(item.block_table[:needed]) < 0 or max(item.block_table[:needed]) >= self._arena.num_blocks:
            raise ValueError(f"block ids must be in [0, {self._arena.num_blocks})")

    def _inputs(self, items: tuple[BatchItem, ...], places: Iterable[int] | None = None) -> StepInputs:
        """Return tensors of items as they lie; logits are wanted in the order of `places`, or of the items."""
        counts = [len(item.token_ids) for item in items]
        ends = list(accumulate(counts))
        entries = self._long(chain.from_iterable(range(item.kv_start, item.kv_length) for item in items))
        positions = self._long(chain.from_iterable(item.positions for item in items))
        tables = self._tables(items)
        row_of_token = torch.repeat_interleave(self._long(range(len(items))), self._long(counts))
        block_tokens = self.layout.block_tokens
        write = WritePlan(blocks=tables[row_of_token, entries // block_tokens], slots=entries % block_tokens)
        write_positions(self._arena.slot_positions, positions, write)
        is_ordered = all(map(_is_ordered, items))
        if not is_ordered:
            self._note_ordered(items, tables)
        return StepInputs(
            token_ids=self._long(chain.from_iterable(item.token_ids for item in items)),
            positions=positions,
            write=write,
            attend=AttendPlan(
                cu_seqlens=self._long([0, *ends]),
                block_tables=tables,
                kv_lengths=self._long(item.kv_length for item in items),
                slot_positions=None if is_ordered else self._arena.slot_positions,
            ),
            sample_rows=self._long(
                ends[place] - 1 for place in (range(len(items)) if places is None else places) if items[place].sample
            ),
        )

    def _tables(self, items: tuple[BatchItem, ...]) -> torch.Tensor:
        """Return block tables, padded with a block of the same row, `[items, most blocks needed]`."""
        needed = [blocks_for(item.kv_length, self.layout.block_tokens) for item in items]
        width = max(needed)
        return torch.tensor(
            [
                item.block_table[:count] + item.block_table[:1] * (width - count)
                for item, count in zip(items, needed, strict=True)
            ],
            device=self._model.device,
        )

    def _note_ordered(self, items: tuple[BatchItem, ...], tables: torch.Tensor) -> None:
        """Write the positions of ordered items too: blocks that a peer sent came without them."""
        block_tokens = self.layout.block_tokens
        for item, table in zip(items, tables, strict=True):
            if _is_ordered(item):
                entries = self._long(range(item.kv_length))
                plan = WritePlan(blocks=table[entries // block_tokens], slots=entries % block_tokens)
                write_positions(self._arena.slot_positions, entries, plan)

    def _long(self, values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=self._model.device)


def _is_ordered(item: BatchItem) -> bool:
    """Return whether entry i of the sequence has position i."""
    return not item.reads_slot_positions and item.positions == tuple(range(item.kv_start, item.kv_length))
