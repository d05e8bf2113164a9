"""Where the KV of a step goes and how far its heads are turned."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WritePlan:
    """Place of each token in the arena.

    Attributes:
        blocks: `[tokens]`, long.
        slots: `[tokens]`, long, place in the block.
    """

    blocks: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rotation:
    """Rotary embedding of the tokens of a step, for halves (not interleaved pairs).

    Attributes:
        cos: `[tokens, 1, dim]`, fp32, each half the same.
        sin: Like `cos`, the first half negated.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def rotation_at(positions: torch.Tensor, inverse_frequencies: torch.Tensor, magnitude: float = 1.0) -> Rotation:
    """Return the rotation of RoFormer (arXiv:2104.09864, section 3.4.2) at explicit positions.

    Args:
        positions: `[tokens]` int.
        inverse_frequencies: `[dim / 2]`, fp64, radians per position: an fp32 angle at position
            8,192 is already off by 5e-4.
        magnitude: Factor of both cos and sin.
    """
    angles = torch.outer(positions.double(), inverse_frequencies)
    cos, sin = (angles.cos() * magnitude).float(), (angles.sin() * magnitude).float()
    return Rotation(cos=torch.cat((cos, cos), dim=-1).unsqueeze(1), sin=torch.cat((-sin, sin), dim=-1).unsqueeze(1))
