"""The memory of a worker's KV blocks: one allocation, registered once with the transport."""

import mmap

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.core.block import BlockId, KvLayout
from headrace.runtime.host_memory import map_host_memory

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class KvArena:
    """Owns `[blocks, layers, 2, block_tokens, kv_heads, head_dim]`, block after block.

    Attributes:
        layout: Form of a block.
        num_blocks: Blocks that sequences and transports may use.
        pad_blocks: Blocks behind them, for the runner's pads alone.
        data: The tensor; its memory starts on a page and holds zeros at first.
        slot_positions: `[blocks, block_tokens]`, int32, RoPE position of each slot that this process wrote.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device, *, num_pad_blocks: int = 0) -> None:
        """Allocate.

        Raises:
            ValueError: `num_blocks` is not positive or the dtype is unknown.
        """
        if num_blocks <= 0 or layout.dtype not in _DTYPES:
            raise ValueError(f"wanted blocks > 0 of {sorted(_DTYPES)}; found {num_blocks} of {layout.dtype}")
        self.layout = layout
        self.num_blocks = num_blocks
        total = num_blocks + num_pad_blocks
        self.pad_blocks = tuple(BlockId(block) for block in range(num_blocks, total))
        size_bytes = total * layout.block_bytes
        memory = _zeros(size_bytes + mmap.PAGESIZE, device)
        start = -memory.data_ptr() % mmap.PAGESIZE
        shape = (total, layout.num_layers, 2, layout.block_tokens, layout.num_kv_heads, layout.head_dim)
        self.data = memory[start : start + size_bytes].view(_DTYPES[layout.dtype]).view(shape)
        self.slot_positions = torch.zeros((total, layout.block_tokens), dtype=torch.int32, device=device)

    @property
    def base_address(self) -> int:
        """Address of block 0 in this process."""
        return self.data.data_ptr()

    @property
    def block_bytes(self) -> int:
        """Bytes from one block to the next."""
        return self.layout.block_bytes

    def block_bytes_of(self, block: BlockId) -> NDArray[np.uint8]:
        """Return the bytes of a block, `[block_bytes]`, uint8: on a CPU they themselves, else a copy."""
        flat: NDArray[np.uint8] = self.data[block].view(torch.uint8).cpu().numpy().reshape(-1)
        return flat


def _zeros(size_bytes: int, device: torch.device) -> torch.Tensor:
    """Return zeros, on a CPU without touching them: pages come with their first use, not 1 GiB of them at the start.

    Writing them all took 0.8 s per GiB (2-core Zen 3, 2026-11-21).
    """
    if device.type != "cpu":
        return torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    return torch.frombuffer(map_host_memory(size_bytes), dtype=torch.uint8)
