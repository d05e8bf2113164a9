"""Weights in the panels that `csrc/linear.cpp` reads."""

from dataclasses import dataclass

import torch

from headrace_kernels.native.abi import Format

PANEL = 16
BLOCK = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """A weight in the grid of its file: `scale * code`, or `scale * code + minimum`.

    Attributes:
        codes: `[out, in]`, uint8 below 16 with minima (int4), int8 without.
        scales: `[out, in / 32]`, fp16.
        minima: `[out, in / 32]`, fp16; None for int8.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None

    @property
    def format(self) -> Format:
        """How its panels are coded."""
        return Format.INT8 if self.minima is None else Format.INT4

    def rows(self, order: torch.Tensor) -> "Grid":
        """Return the grid with its outputs in another order."""
        minima = None if self.minima is None else self.minima[order]
        return Grid(codes=self.codes[order], scales=self.scales[order], minima=minima)

    def dequantise(self) -> torch.Tensor:
        """Return the weight, `[out, in]`, fp32."""
        scales = self.scales.float().repeat_interleave(BLOCK, dim=1)
        weight = self.codes.float() * scales
        return weight if self.minima is None else weight + self.minima.float().repeat_interleave(BLOCK, dim=1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """A weight in panels.

    Attributes:
        format: How they are coded.
        out_size: Outputs.
        in_size: Inputs.
        data: The panels, bytes.
    """

    format: Format
    out_size: int
    in_size: int
    data: torch.Tensor

    @classmethod
    def of(cls, weight: Grid | torch.Tensor) -> "Packed":
        """Pack a weight; see `pack`."""
        out_size, in_size = weight.codes.shape if isinstance(weight, Grid) else weight.shape
        coded = weight.format if isinstance(weight, Grid) else Format.BF16
        return cls(format=coded, out_size=out_size, in_size=in_size, data=pack(weight))


def join(grids: list[Grid]) -> Grid | None:
    """Return the outputs of all grids below each other; None if their formats differ."""
    if len({grid.format for grid in grids}) > 1:
        return None
    minima = [grid.minima for grid in grids if grid.minima is not None]
    return Grid(
        codes=torch.cat([grid.codes for grid in grids]),
        scales=torch.cat([grid.scales for grid in grids]),
        minima=torch.cat(minima) if minima else None,
    )


def pack(weight: Grid | torch.Tensor) -> torch.Tensor:
    """Return the panels of a weight, bytes.

    Args:
        weight: A grid, or `[out, in]` to be stored in bf16.

    Raises:
        ValueError: The inputs are no multiple of 32.
    """
    if isinstance(weight, torch.Tensor):
        _check(weight.shape[1])
        padded = _pad(weight.to(torch.bfloat16))
        return padded.view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous().view(torch.uint8).flatten()
    _check(weight.codes.shape[1])
    blocks = weight.codes.shape[1] // BLOCK
    codes = _pad(weight.codes)
    heads = [_heads(weight.scales)]
    if weight.minima is None:
        lanes = codes.view(-1, 2, 8, blocks, 16, 2).permute(0, 3, 4, 2, 5, 1).contiguous().view(torch.uint8)
    else:
        heads.append(_heads(weight.minima))
        nibbles = codes.view(-1, 2, 8, blocks, 8, 2, 2).permute(0, 3, 4, 2, 6, 5, 1).to(torch.int32)
        packed = nibbles[..., 0, 0] | nibbles[..., 0, 1] << 4 | nibbles[..., 1, 0] << 8 | nibbles[..., 1, 1] << 12
        lanes = packed.to(torch.int16).contiguous().view(torch.uint8)
    panels = lanes.shape[0]
    return torch.cat([*heads, lanes.reshape(panels, blocks, -1)], dim=2).flatten()


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return rows of gate and up in the order of gated epilogues: 8 gates, their 8 ups, and so on."""
    return torch.stack([gate.view(-1, PANEL // 2, *gate.shape[1:]), up.view(-1, PANEL // 2, *up.shape[1:])], 1).view(
        -1, *gate.shape[1:]
    )


def _check(in_size: int) -> None:
    if in_size % BLOCK:
        raise ValueError(f"wanted inputs in multiples of {BLOCK}; found {in_size}")


def _pad(rows: torch.Tensor) -> torch.Tensor:
    missing = -rows.shape[0] % PANEL
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _heads(values: torch.Tensor) -> torch.Tensor:
    """Return fp16 `[out, blocks]` as bytes `[panels, blocks, 32]`."""
    panels = _pad(values.to(torch.float16)).view(-1, PANEL, values.shape[1])
    return panels.transpose(1, 2).contiguous().view(torch.uint8)
