"""Makes the policies that a worker's settings name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from headrace import catalog
from headrace.core.cost import CostModel
from headrace.engine.packing import PaddedRows
from headrace.engine.scheduler import RECOMPUTE_ALWAYS, FirstComeFirstServed, WholeShape
from headrace.errors import ConfigError
from headrace.seams.order import OrderPolicy
from headrace.seams.pack import PackPolicy
from headrace.seams.preempt import PreemptContext, PreemptPolicy
from headrace.seams.shape import ShapeContext, ShapePolicy
from headrace.worker.config import Pack, Preempt, StreamOrder, WorkerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """What decides in an engine."""

    order: OrderPolicy
    shape: ShapePolicy
    preempt: PreemptPolicy


def check_policies(config: WorkerConfig) -> None:
    """Refuse settings that name no policy, before anything takes time.

    Raises:
        ConfigError: there is none of a name.
    """
    shape_maker(config.shape)


def make_policies(config: WorkerConfig, cost: CostModel | None) -> Policies:
    """Return the policies of a worker.

    Args:
        config: Its settings.
        cost: What its steps cost, if that was measured.

    Raises:
        ConfigError: settings contradict each other.
    """
    return Policies(
        order=make_order(config.stream_order),
        shape=shape_maker(config.shape)(shape_context(config, cost)),
        preempt=make_preempt(config.preempt, cost),
    )


def make_order(order: StreamOrder) -> OrderPolicy:
    """Return an order policy."""
    if order is StreamOrder.DEFAULT:
        return FirstComeFirstServed()
    make = catalog.load("stream2llm").order
    assert make is not None
    return make(order.value)


def make_preempt(preempt: Preempt, cost: CostModel | None) -> PreemptPolicy:
    """Return a preemption policy."""
    if preempt is Preempt.RECOMPUTE:
        return RECOMPUTE_ALWAYS
    make = catalog.load("stream2llm").preempt
    assert make is not None
    is_sound = cost is not None and cost.is_sound
    return make(PreemptContext(cost=cost if is_sound else None, always_saves=preempt is Preempt.SWAP))


def shape_context(config: WorkerConfig, cost: CostModel | None) -> ShapeContext:
    """Return what the worker's shape is made with.

    Raises:
        ConfigError: the target is no time.
    """
    target_ms = config.tbt_target_ms
    if target_ms is not None and target_ms <= 0:
        raise ConfigError(f"wanted a target above 0 ms, found {target_ms}", field="tbt_target_ms")
    return ShapeContext(
        cost=cost,
        tbt_target_s=None if target_ms is None else target_ms / 1000,
        is_dynamic=config.dynamic_chunks,
    )


def shape_maker(name: str) -> Callable[[ShapeContext], ShapePolicy]:
    """Return what makes a shape policy: that of `whole`, or of a technique that fills the seam.

    Raises:
        ConfigError: there is none of that name.
    """
    if name == "whole":
        return _whole
    technique = catalog.load(name)
    if technique.shape is None:
        raise ConfigError(f"technique {name} does not shape steps", field="shape")
    return technique.shape


def _whole(context: ShapeContext) -> ShapePolicy:
    if context.tbt_target_s is not None or context.is_dynamic:
        raise ConfigError("shape whole cuts nothing: it keeps to no target and has no dynamic chunks", field="shape")
    return WholeShape()


def make_pack(pack: Pack) -> PackPolicy | None:
    """Return a pack policy; None for one token axis without pads."""
    match pack:
        case Pack.VARLEN:
            return None
        case Pack.PAD:
            return PaddedRows()
        case Pack.BINS:
            make = catalog.load("prepacking").pack
            assert make is not None
            return make()
        case _:
            assert_never(pack)
