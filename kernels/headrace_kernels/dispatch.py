"""Choice of an implementation by device and dtype; the reference is always there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementations(Generic[P, R]):
    """All implementations of one operation.

    Attributes:
        reference: Plain torch, any device and dtype.
        fast: Faster ones by device type ("cpu", "cuda") and dtype of the activations.
    """

    reference: Callable[P, R]
    fast: Mapping[tuple[str, torch.dtype], Callable[P, R]] = field(default_factory=dict)

    def choose(self, device: torch.device, dtype: torch.dtype) -> Callable[P, R]:
        """Return the fastest implementation for these activations; it checks nothing."""
        return self.fast.get((device.type, dtype), self.reference)
