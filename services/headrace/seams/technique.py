"""What a technique's folder says of itself."""

from collections.abc import Callable
from dataclasses import dataclass

from headrace.seams.order import OrderPolicy
from headrace.seams.pack import PackPolicy
from headrace.seams.preempt import PreemptContext, PreemptPolicy
from headrace.seams.shape import ShapeContext, ShapePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Technique:
    """Manifest of one technique: one folder under `techniques/`, one published system.

    Attributes:
        name: Name of the folder, the setting, the metric label and the tests.
        title: Name of the paper.
        paper: Where it was published.
        url: Where the paper can be read.
        is_lossless: Whether its tokens equal the baseline's; a lossy one states its bound in its README.
        measured: Ratio to the baseline with the machine and the date, or what keeps it from being measured.
        shape: Makes the shape policy, if the technique fills that seam.
        pack: Likewise the pack policy.
        order: Likewise an order policy, by its name among the technique's own.
        preempt: Likewise the preemption policy.
    """

    name: str
    title: str
    paper: str
    url: str
    is_lossless: bool
    measured: str
    shape: Callable[[ShapeContext], ShapePolicy] | None = None
    pack: Callable[[], PackPolicy] | None = None
    order: Callable[[str], OrderPolicy] | None = None
    preempt: Callable[[PreemptContext], PreemptPolicy] | None = None

    @property
    def seams(self) -> tuple[str, ...]:
        """Names of the seams it fills."""
        factories = {"shape": self.shape, "pack": self.pack, "order": self.order, "preempt": self.preempt}
        return tuple(name for name, factory in factories.items() if factory is not None)
