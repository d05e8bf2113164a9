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
    CLEARLY_FASTER,
    CLEARLY_SHORTER,
    LEAST_KEPT,
    MARGIN,
    QUIET_ROUNDS,
    ROWS,
    FirstLayers,
    RowsDecoder,
    RowTable,
    first_layers,
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
        ([0.5, 0.9, 1.0, MARGIN], 8),
        ([0.5, 1.6, 2.0, 3.0], 2),
        ([2.0, 2.0, 2.0, 2.0], 1),
        ([0.5, 2.0, 1.0, 3.0], 8),
        ([0.5, 2.0, CLEARLY_FASTER, 3.0], 2),
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
    """A computation that takes as long as it is told to, longer in the rounds that somebody else disturbs."""

    def __init__(self, name, row_s, begun, clock, num_disturbed):
        self.name, self.row_s, self.begun, self.clock = name, row_s, begun, clock
        self.num_disturbed = num_disturbed

    def __call__(self, step, arena, threads=None):
        rows = step.token_ids.shape[0]
        is_disturbed = self.begun.count((self.name, rows)) < self.num_disturbed
        self.begun.append((self.name, rows))
        self.clock.advance(rows * self.row_s * (1.5 if is_disturbed else 1.0))
        return torch.empty(0)


def scripted_table(native_row_s, torch_row_s, limit_s, num_disturbed=1, known=None):
    clock, begun = VirtualClock(), []
    paths = [
        Scripted(name, row_s, begun, clock, num_disturbed)
        for name, row_s in (("native", native_row_s), ("torch", torch_row_s))
    ]
    return measure(*paths, first_layers(TINY_LLAMA), lambda: 1, clock, limit_s, known), begun, clock.now()


def scaled(row_s):
    return pytest.approx([row_s * rows for rows in ROWS])


def test_both_paths_are_timed_in_turns_and_the_least_time_counts():
    table, begun, _ = scripted_table(1e-3, 2e-3, limit_s=100.0)
    assert table.rows == ROWS
    assert (table.native_s, table.torch_s) == (scaled(1e-3), scaled(2e-3))
    in_turns = [(name, rows) for rows in ROWS for name in ("native", "torch")]
    assert begun == in_turns * (2 + QUIET_ROUNDS)


def test_rounds_go_on_while_they_find_shorter_times():
    table, begun, _ = scripted_table(1e-3, 2e-3, limit_s=100.0, num_disturbed=QUIET_ROUNDS)
    assert table.torch_s == scaled(2e-3)
    assert begun.count(("torch", 1)) == QUIET_ROUNDS + 1 + QUIET_ROUNDS


def known_of(native_row_s, torch_row_s):
    return RowTable(
        rows=ROWS,
        native_s=tuple(native_row_s * rows for rows in ROWS),
        torch_s=tuple(torch_row_s * rows for rows in ROWS),
    )


def test_a_later_start_looks_once_whether_its_table_was_one_of_a_busy_machine():
    known = known_of(1e-3, 2e-3)
    table, begun, _ = scripted_table(1e-3, 2e-3, limit_s=100.0, num_disturbed=0, known=known)
    assert (table.native_s, table.torch_s) == (scaled(1e-3), scaled(2e-3))
    assert len(begun) == 2 * len(ROWS)


def test_a_busy_start_spoils_no_table_and_a_quiet_one_mends_it():
    known = known_of(1e-3, 2e-3)
    assert scripted_table(1.4e-3, 5e-3, limit_s=100.0, known=known)[0] == known
    mended, begun, _ = scripted_table(1e-3, 0.5e-3, limit_s=100.0, num_disturbed=0, known=known)
    assert (known.torch_from, mended.torch_from) == (None, 1)
    assert len(begun) == 2 * 2 * len(ROWS)


def test_what_is_hardly_shorter_makes_no_further_round():
    known = known_of(1e-3, 2e-3)
    hardly = (1 + CLEARLY_SHORTER) / 2
    table, begun, _ = scripted_table(hardly * 1e-3, 2e-3, limit_s=100.0, num_disturbed=0, known=known)
    assert table.native_s == scaled(hardly * 1e-3)
    assert len(begun) == 2 * len(ROWS)


def test_rows_that_an_earlier_start_had_no_time_for_are_timed():
    known = first_rows(ROWS.index(LEAST_KEPT) + 1)
    table, _, _ = scripted_table(1 / 3000, 3e-3, limit_s=100.0, num_disturbed=0, known=known)
    assert table.rows == ROWS


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
def test_real_layers_are_measured_either_way(smollm2_path, quantised):
    source = GgufFile(smollm2_path)
    spec, weights = first_layers(source.spec), FirstLayers(source)
    native = NativeDecoder(spec, weights, quantised=quantised, most_threads=1)
    plain = build_decoder(spec, weights, dtype=torch.bfloat16, device=CPU)
    assert 1 < len(spec.layers) < len(source.spec.layers)
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
