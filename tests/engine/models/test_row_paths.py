"""Which path takes a step: by a table of times, the same bits as that path alone, and never worse than bf16."""

import json
import math

import pytest
import torch

from headrace.clock import VirtualClock, WallClock
from headrace.engine.arena import KvArena
from headrace.engine.batch import Batch, batch_item
from headrace.engine.kept_file import KeptFile
from headrace.engine.models.decoder import build_decoder
from headrace.engine.models.gguf import GgufFile
from headrace.engine.models.loader import Model
from headrace.engine.models.native import NativeDecoder
from headrace.engine.models.row_paths import (
    LEAST_KEPT,
    MARGIN,
    ROUNDS,
    ROWS,
    FirstLayer,
    RowsDecoder,
    RowTable,
    first_layer,
    keep_table,
    known_table,
    measure,
)
from headrace.engine.runner import ModelRunner
from headrace.testing.tiny_llama import TINY_LLAMA, RandomWeights

CPU = torch.device("cpu")
BORDER = 16
THREADS = 2


def table_of(gains):
    rows = tuple(2**power for power in range(len(gains)))
    return RowTable(rows=rows, native_s=tuple(gains), torch_s=(1.0,) * len(gains))


@pytest.mark.parametrize(
    ("gains", "wanted"),
    [
        ([], None),
        ([0.5, 0.9, 1.1, 1.4], None),
        ([0.5, 0.9, 1.1, MARGIN], 8),
        ([0.5, 1.6, 2.0, 3.0], 2),
        ([2.0, 2.0, 2.0, 2.0], 1),
        ([0.5, 2.0, 1.2, 3.0], 8),
        ([0.5, 2.0, 3.0, 1.2], None),
        ([2.9, 0.5, 0.9, 1.6], 8),
    ],
)
def test_torch_is_chosen_from_where_on_it_is_clearly_faster_all_the_way(gains, wanted):
    assert table_of(gains).torch_from == wanted


TABLE = RowTable(rows=ROWS, native_s=tuple(rows / 3000 for rows in ROWS), torch_s=(3e-3,) * len(ROWS))


def kept_in(folder):
    return KeptFile(folder, "rows", {"processor": "Fast", "threads": 2})


def test_a_table_is_kept_to_the_bit(tmp_path):
    keep_table(kept_in(tmp_path), TABLE)
    assert known_table(kept_in(tmp_path)) == TABLE


def first_rows(count):
    return RowTable(rows=ROWS[:count], native_s=TABLE.native_s[:count], torch_s=TABLE.torch_s[:count])


def test_a_table_that_ends_before_many_rows_is_not_kept(tmp_path):
    keep_table(kept_in(tmp_path), first_rows(ROWS.index(LEAST_KEPT)))
    assert not list(tmp_path.iterdir())


def test_a_table_that_tells_few_rows_from_many_is_kept(tmp_path):
    table = first_rows(ROWS.index(LEAST_KEPT) + 1)
    keep_table(kept_in(tmp_path), table)
    assert known_table(kept_in(tmp_path)) == table


def test_without_a_file_nothing_is_kept_or_known():
    keep_table(None, TABLE)
    assert known_table(None) is None


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": ROWS[:-1]},
        {"rows": ROWS[::-1]},
        {"rows": ROWS[1:], "native_s": TABLE.native_s[1:], "torch_s": TABLE.torch_s[1:]},
        {"rows": 3},
        {"native_s": TABLE.native_s[1:]},
        {"native_s": (0.0, *TABLE.native_s[1:])},
        {"native_s": (-1.0, *TABLE.native_s[1:])},
        {"native_s": (math.nan, *TABLE.native_s[1:])},
        {"native_s": (10**400, *TABLE.native_s[1:])},
        {"torch_s": (math.inf, *TABLE.torch_s[1:])},
        {"torch_s": (None, *TABLE.torch_s[1:])},
        {"torch_s": "fast"},
        {"more": ROWS},
    ],
)
def test_a_table_that_makes_no_sense_counts_for_nothing(tmp_path, damage):
    kept = kept_in(tmp_path)
    keep_table(kept, TABLE)
    content = json.loads(kept.path.read_text())
    content["rows"] |= damage
    kept.path.write_text(json.dumps(content))
    assert known_table(kept) is None


@pytest.fixture
def threads_kept():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Scripted:
    """A computation that takes as long as it is told to, longer at each first time."""

    def __init__(self, name, row_s, begun, clock):
        self.name, self.row_s, self.begun, self.clock = name, row_s, begun, clock

    def __call__(self, step, arena, threads=None):
        rows = step.token_ids.shape[0]
        is_first = (self.name, rows) not in self.begun
        self.begun.append((self.name, rows))
        self.clock.advance(rows * self.row_s * (1.5 if is_first else 1.0))
        return torch.empty(0)


def scripted_table(native_row_s, torch_row_s, limit_s):
    clock, begun = VirtualClock(), []
    paths = (Scripted("native", native_row_s, begun, clock), Scripted("torch", torch_row_s, begun, clock))
    return measure(*paths, first_layer(TINY_LLAMA), lambda: 1, clock, limit_s), begun, clock.now()


def test_both_paths_are_timed_in_turns_and_the_least_time_counts():
    table, begun, _ = scripted_table(1e-3, 2e-3, limit_s=100.0)
    assert table.rows == ROWS
    assert table.native_s == pytest.approx([1e-3 * rows for rows in ROWS])
    assert table.torch_s == pytest.approx([2e-3 * rows for rows in ROWS])
    assert begun == [(name, rows) for rows in ROWS for name in ("native", "torch")] * ROUNDS


@pytest.mark.usefixtures("threads_kept")
def test_measuring_gives_torch_its_threads_back():
    torch.set_num_threads(THREADS)
    scripted_table(1e-3, 2e-3, limit_s=100.0)
    assert torch.get_num_threads() == THREADS


@pytest.mark.parametrize("limit_s", [0.1, 0.5, 3.0])
def test_measuring_ends_in_time_with_what_it_has_timed_twice(limit_s):
    table, begun, taken_s = scripted_table(1e-3, 2e-3, limit_s)
    assert taken_s <= limit_s
    assert 0 < len(table.rows) < len(ROWS)
    assert table.rows == ROWS[: len(table.rows)]
    assert all(begun.count(("native", rows)) >= 2 for rows in table.rows)


@pytest.mark.cpu
@pytest.mark.parametrize("quantised", [True, False], ids=["grid", "bf16"])
def test_a_real_layer_is_measured_either_way(smollm2_path, quantised):
    source = GgufFile(smollm2_path)
    spec, weights = first_layer(source.spec), FirstLayer(source)
    native = NativeDecoder(spec, weights, quantised=quantised, most_threads=1)
    plain = build_decoder(spec, weights, dtype=torch.bfloat16, device=CPU)
    table = measure(native, plain, spec, lambda: 1, WallClock(), limit_s=60.0)
    assert table.rows == ROWS
    assert all(0 < seconds < math.inf for seconds in (*table.native_s, *table.torch_s))
    assert table.native_s[-1] > table.native_s[0]


@pytest.fixture(scope="module")
def paths():
    weights = RandomWeights()
    native = NativeDecoder(TINY_LLAMA, weights, quantised=False, most_threads=THREADS)
    plain = build_decoder(TINY_LLAMA, weights, dtype=torch.bfloat16, device=CPU)
    exact = build_decoder(TINY_LLAMA, weights, dtype=torch.float32, device=CPU)
    both = RowsDecoder(native, plain, torch_from=BORDER, most_threads=THREADS)
    return {"native": native, "torch": plain, "fp32": exact, "both": both}


def runner_of(decoder, dtype=torch.bfloat16, threads=lambda: THREADS):
    model = Model(spec=TINY_LLAMA, decoder=decoder, contents=(), dtype=dtype, device=CPU)
    return ModelRunner(model, KvArena(model.kv_layout(), 16, CPU), threads)


def prompt(size, start=0):
    return batch_item(
        [(7 * (start + place)) % TINY_LLAMA.vocab_size for place in range(size)], start, range(8), sample=True
    )


@pytest.mark.cpu
@pytest.mark.parametrize("rows", [1, BORDER - 1, BORDER, BORDER + 1, 40])
def test_a_step_has_the_bits_of_the_path_that_its_rows_name(paths, rows):
    batch = Batch(items=(prompt(rows),))
    found = {name: runner_of(paths[name]).run(batch) for name in ("both", "native", "torch")}
    assert not found["native"].equal(found["torch"])
    assert found["both"].equal(found["native" if rows < BORDER else "torch"])


@pytest.mark.cpu
def test_rows_of_all_sequences_count_together(paths):
    items = tuple(batch_item([row + 1], 0, [row], sample=True) for row in range(BORDER))
    for kept, name in ((BORDER - 1, "native"), (BORDER, "torch")):
        batch = Batch(items=items[:kept])
        assert runner_of(paths["both"]).run(batch).equal(runner_of(paths[name]).run(batch))


@pytest.mark.cpu
@pytest.mark.usefixtures("threads_kept")
@pytest.mark.parametrize("threads", [None, lambda: THREADS], ids=["no share", "a share"])
def test_torch_has_its_threads_again_after_a_native_step(paths, threads):
    runner = runner_of(paths["both"], threads=threads)
    runner.run(Batch(items=(prompt(1),)))
    assert torch.get_num_threads() == 1
    runner.run(Batch(items=(prompt(BORDER),)))
    assert torch.get_num_threads() == THREADS


def continued(runner):
    """Logits of a prompt of torch's rows, and of an answer whose steps have native ones."""
    found = [runner.run(Batch(items=(prompt(40),)))]
    found += [runner.run(Batch(items=(prompt(1, start),))) for start in range(40, 60)]
    return torch.cat(found)


@pytest.mark.cpu
def test_an_answer_over_a_prompt_of_the_other_path_is_no_farther_from_fp32_than_bf16_is(paths):
    wanted = continued(runner_of(paths["fp32"], torch.float32))
    errors = {name: (continued(runner_of(paths[name])) - wanted).abs().mean() for name in ("both", "native", "torch")}
    assert errors["native"] < errors["both"] < errors["torch"]
    assert errors["both"] < 0.02 * wanted.std()
