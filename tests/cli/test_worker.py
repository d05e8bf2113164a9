from pathlib import Path

import pytest

from headrace.cli.worker import make_pack, shape_context, shape_maker
from headrace.core.cost import CostModel
from headrace.engine.packing import PaddedRows
from headrace.engine.scheduler import WholeShape
from headrace.errors import ConfigError
from headrace.techniques.prepacking.bins import FirstFitDecreasing
from headrace.techniques.sarathi.shape import ChunkedShape
from headrace.worker.config import Pack, WorkerConfig, WorkerRole

COST = CostModel(step_s=1e-2, prompt_s=1e-2, token_s=1e-3, pair_s=1e-7, decode_s=1e-3, context_s=1e-6)


def shape_of(cost, **settings):
    config = WorkerConfig(name="w", role=WorkerRole.HYBRID, model=Path("m.gguf"), **settings)
    return shape_maker(config.shape)(shape_context(config, cost))


@pytest.mark.parametrize(("name", "kind"), [("sarathi", ChunkedShape), ("whole", WholeShape)])
def test_a_worker_shapes_steps_as_its_setting_says(name, kind):
    assert isinstance(shape_of(None, shape=name), kind)


def test_targets_are_given_in_milliseconds_and_kept_in_seconds():
    config = WorkerConfig(name="w", role=WorkerRole.HYBRID, model=Path("m.gguf"), tbt_target_ms=50, dynamic_chunks=True)
    context = shape_context(config, COST)
    assert (context.tbt_target_s, context.is_dynamic, context.cost) == (0.05, True, COST)
    assert isinstance(shape_of(COST, tbt_target_ms=50), ChunkedShape)


@pytest.mark.parametrize(
    ("cost", "settings"),
    [
        (COST, {"shape": "whole", "tbt_target_ms": 50}),
        (COST, {"shape": "whole", "dynamic_chunks": True}),
        (COST, {"shape": "prepacking"}),
        (COST, {"shape": "nothing"}),
        (COST, {"tbt_target_ms": 0}),
        (None, {"tbt_target_ms": 50}),
    ],
)
def test_settings_of_shape_that_cannot_be_kept_are_refused(cost, settings):
    with pytest.raises(ConfigError):
        shape_of(cost, **settings)


@pytest.mark.parametrize(("pack", "kind"), [(Pack.BINS, FirstFitDecreasing), (Pack.PAD, PaddedRows)])
def test_a_worker_packs_as_its_setting_says(pack, kind):
    assert isinstance(make_pack(pack), kind)


def test_varlen_packs_nothing():
    assert make_pack(Pack.VARLEN) is None
