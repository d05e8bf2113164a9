import dataclasses
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.cli.policies import make_pack, make_policies, make_preempt, shape_context, shape_maker
from headrace.cli.worker import build, build_machine, in_own_thread, step_cost
from headrace.clock import VirtualClock
from headrace.core.block import KvLayout
from headrace.core.cost import CostModel, chunk_work, decode_work
from headrace.core.plan import SchedulerView, SequenceView, SwapView
from headrace.engine.arena import KvArena
from headrace.engine.calibrate import CHECKED, CHECKS, PROBES, blocks_wanted, probes_for
from headrace.engine.cores import Cores
from headrace.engine.cost_file import CostFile, Instance
from headrace.engine.packing import PaddedRows
from headrace.engine.runner import ModelRunner
from headrace.engine.scheduler import FirstComeFirstServed, WholeShape
from headrace.errors import ConfigError
from headrace.techniques.prepacking.bins import FirstFitDecreasing
from headrace.techniques.sarathi.shape import ChunkedShape
from headrace.techniques.stream2llm.order import ClosedFirst, MostComputedFirst
from headrace.testing.runner import FakeRunner
from headrace.worker.config import Dtype, Pack, Preempt, StreamOrder, WorkerConfig, WorkerRole

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 64}

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


@pytest.mark.parametrize(
    ("settings", "order", "saves"),
    [
        ({}, ClosedFirst, True),
        ({"stream_order": StreamOrder.DEFAULT, "preempt": Preempt.RECOMPUTE}, FirstComeFirstServed, False),
        ({"stream_order": StreamOrder.MCPS, "preempt": Preempt.SWAP}, MostComputedFirst, True),
    ],
)
def test_a_worker_ranks_and_preempts_as_its_settings_say(settings, order, saves):
    config = WorkerConfig(name="w", role=WorkerRole.HYBRID, model=Path("m.gguf"), **settings)
    policies = make_policies(config, COST)
    assert isinstance(policies.order, order)
    victim = SequenceView(
        sequence_id="s", arrival=0, num_tokens=4000, num_computed=4000, num_blocks=250, is_running=True
    )
    view = SchedulerView(num_available=0, block_tokens=16, num_layers=1, token_budget=512, max_running=1)
    assert policies.preempt.saves(victim, view) is saves


def test_an_unsound_cost_is_not_gone_by():
    victim = SequenceView(
        sequence_id="s", arrival=0, num_tokens=4000, num_computed=4000, num_blocks=250, is_running=True
    )
    slow = SwapView(num_free_blocks=1000, save_s=100.0, load_s=100.0)
    view = SchedulerView(num_available=0, block_tokens=16, num_layers=1, token_budget=512, max_running=1, swap=slow)
    assert not make_preempt(Preempt.AUTO, COST).saves(victim, view)
    for cost in (None, dataclasses.replace(COST, r2=0.5)):
        assert make_preempt(Preempt.AUTO, cost).saves(victim, view)


def test_int4_is_an_error_where_auto_would_be_bf16(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1)).save_pretrained(tmp_path)
    config = WorkerConfig(name="w", role=WorkerRole.HYBRID, model=tmp_path, dtype=Dtype.INT4, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="no quantised grid"):
        build_machine(config)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_only_auto_measures_which_path_is_faster(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1)).save_pretrained(tmp_path)
    config = WorkerConfig(
        name="w",
        role=WorkerRole.HYBRID,
        model=tmp_path,
        dtype=dtype,
        cache_dir=tmp_path,
        kv_memory_bytes=1 << 20,
        calibrate_s=0.0,
    )
    with nullcontext() if dtype not in {Dtype.INT4, Dtype.INT8} else pytest.raises(ConfigError):
        assert (build_machine(config).model.row_table is not None) is (dtype is Dtype.AUTO)
    assert dtype is Dtype.AUTO or not list(tmp_path.glob("rows-*"))


async def test_all_that_computes_before_the_engine_does_so_in_a_thread_that_ends(tmp_path, monkeypatch):
    """Its OpenMP threads would make those of the engine wait by sleeping: prompts took up to twice as long."""
    LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1)).save_pretrained(tmp_path)
    config = WorkerConfig(
        name="w", role=WorkerRole.HYBRID, model=tmp_path, cache_dir=tmp_path, kv_memory_bytes=8 << 20, calibrate_s=0.2
    )
    users = {}

    def recorded(name, method):
        def call(runner, *args):
            users.setdefault(name, set()).add(threading.current_thread())
            return method(runner, *args)

        return call

    for name in ("run", "read_blocks", "write_blocks"):
        monkeypatch.setattr(ModelRunner, name, recorded(name, getattr(ModelRunner, name)))
    _, engine = await in_own_thread(partial(build, config, lambda _: None))
    assert engine.stats().total_blocks > 0
    assert set(users) == {"run", "read_blocks", "write_blocks"}
    (thread,) = set.union(*users.values())
    thread.join(timeout=10.0)
    assert not thread.is_alive()


def test_varlen_packs_nothing():
    assert make_pack(Pack.VARLEN) is None


LIMIT_S = 20.0
BLOCKS = blocks_wanted(16, probes_for(256))


class Start:
    """One start of a worker whose steps take `slowness` times what COST says."""

    def __init__(self, folder, slowness=1.0, limit_s=LIMIT_S, cost=COST):
        self.clock, self.slowness, self.num_steps, self.true = VirtualClock(), slowness, 0, cost
        self.fake = FakeRunner(BLOCKS)
        self.layout, self.vocab_size = self.fake.layout, self.fake.vocab_size
        self.max_context_tokens = self.fake.max_context_tokens
        instance = Instance(fingerprint="f", device="cpu", threads=1, pack="varlen", processor="p", kernels="k")
        arena = KvArena(
            KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=16, dtype="bf16"),
            BLOCKS,
            torch.device("cpu"),
        )
        file = CostFile(folder, instance)
        self.cost = step_cost(self, arena, Cores(1), limit_s, file, self.clock, cost.wide_from)
        assert not arena.data.any()

    def run(self, batch):
        self.num_steps += 1
        sizes = [(len(item.token_ids), item.kv_start) for item in batch.items]
        work = decode_work(done + 1 for size, done in sizes if size == 1)
        work = sum((chunk_work(size, done) for size, done in sizes if size > 1), work)
        self.clock.advance(self.slowness * self.true.seconds(work))
        return self.fake.run(batch)


def test_a_second_start_takes_the_cost_that_the_first_one_measured(tmp_path):
    first, second = Start(tmp_path), Start(tmp_path)
    assert second.cost == first.cost
    assert first.num_steps > len(PROBES)
    assert second.num_steps == CHECKS * len(CHECKED)


@pytest.mark.parametrize("slowness", [0.3, 3.0])
def test_a_machine_that_became_faster_or_slower_is_measured_again_and_that_is_kept(tmp_path, slowness):
    first, changed, third = Start(tmp_path), Start(tmp_path, slowness), Start(tmp_path, slowness)
    assert changed.cost.seconds(PROBES[0].work) == pytest.approx(
        slowness * first.cost.seconds(PROBES[0].work), rel=0.01
    )
    assert third.cost == changed.cost


def test_long_steps_are_measured_and_checked_where_they_are_computed_another_way(tmp_path):
    wide = dataclasses.replace(COST, wide_from=256, wide_prompt_s=1e-3, wide_token_s=COST.token_s / 3)
    first, second = Start(tmp_path, cost=wide), Start(tmp_path, cost=wide)
    assert first.cost.prefill(2048, chunk_tokens=512) == pytest.approx(wide.prefill(2048, chunk_tokens=512), rel=0.01)
    assert second.cost == first.cost
    slow = dataclasses.replace(wide, wide_token_s=10 * wide.wide_token_s)
    for other in (COST, slow):
        assert Start(tmp_path, cost=other).cost.prefill(512) == pytest.approx(other.prefill(512), rel=0.01)


def test_a_worker_that_is_not_to_measure_takes_no_kept_cost_either(tmp_path):
    Start(tmp_path)
    assert Start(tmp_path, limit_s=0).cost is None
