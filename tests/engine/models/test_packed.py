"""Packed weights kept between starts: the same bits, used only when whole and of this model."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headrace.engine.arena import KvArena
from headrace.engine.batch import Batch, batch_item
from headrace.engine.models.loader import load_model
from headrace.engine.models.packed import PackedWeights, kept_packed, read_packed, write_packed
from headrace.engine.runner import ModelRunner
from headrace_kernels.native import Grid, Packed

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
CONTENTS = (b"digest",)


def grid(seed, minima):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (48, 64), generator=generator, dtype=torch.uint8)
    scales = torch.rand((48, 2), generator=generator).half()
    return Grid(codes=codes if minima else codes.view(torch.int8), scales=scales, minima=-scales if minima else None)


WEIGHTS = {"int4": grid(0, minima=True), "int8": grid(1, minima=False), "bf16": torch.randn(48, 64)}


def unexpected():
    raise AssertionError("packed again")


def keep(folder, make=WEIGHTS.__getitem__, *, model=Path("model.gguf"), contents=CONTENTS, form="grid"):
    """One start; returns its panels and whether none had to be packed."""
    with kept_packed(folder, model, contents, form) as weights:
        for name in WEIGHTS:
            weights.get(name, lambda name=name: make(name))
    return weights.panels, weights.is_complete


def files(folder):
    return sorted(folder.glob("weights-*.safetensors"))


def same(one, other):
    return one.keys() == other.keys() and all(
        (one[name].format, one[name].out_size, one[name].in_size)
        == (other[name].format, other[name].out_size, other[name].in_size)
        and one[name].data.equal(other[name].data)
        for name in one
    )


def test_a_second_start_packs_nothing_and_has_the_same_panels_of_every_format(tmp_path):
    cold, was_complete = keep(tmp_path / "new")
    assert not was_complete
    warm, is_complete = keep(tmp_path / "new", lambda _: unexpected())
    assert is_complete
    assert same(warm, cold)


def test_a_kept_file_is_mapped_and_not_copied(tmp_path):
    keep(tmp_path)
    warm, _ = keep(tmp_path)
    address = warm["int4"].data.data_ptr()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    (place,) = [line for line in lines if int(line[0].split("-")[0], 16) <= address < int(line[0].split("-")[1], 16)]
    assert place[-1] == str(files(tmp_path)[0])


def test_nothing_is_kept_without_a_folder():
    assert not keep(None)[1]
    assert not keep(None)[1]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit_of_a_panel(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def say_another_size(path):
    content = path.read_bytes()
    assert b"48, 64" in content
    path.write_bytes(content.replace(b"48, 64", b"64, 48", 1))


def be_of_another_model(path):
    write_packed(path, "another key", {name: Packed.of(weight) for name, weight in WEIGHTS.items()})


@pytest.mark.parametrize("damage", [cut, empty, flip_a_bit_of_a_panel, say_another_size, be_of_another_model])
def test_a_file_that_is_not_whole_or_not_ours_is_never_used_and_is_written_anew(tmp_path, damage):
    cold, _ = keep(tmp_path)
    damage(files(tmp_path)[0])
    again, is_complete = keep(tmp_path)
    assert not is_complete
    assert same(again, cold)
    assert keep(tmp_path, lambda _: unexpected())[1]


def test_what_a_killed_writer_left_is_no_file_and_is_written_over(tmp_path):
    cold, _ = keep(tmp_path)
    (path,) = files(tmp_path)
    path.rename(path.with_suffix(".unfinished"))
    cut(path.with_suffix(".unfinished"))
    assert not keep(tmp_path)[1]
    assert same(keep(tmp_path, lambda _: unexpected())[0], cold)
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".lock"}


def test_a_changed_model_replaces_the_file_of_the_old_one_and_leaves_those_of_others(tmp_path):
    keep(tmp_path)
    keep(tmp_path, form="bf16")
    keep(tmp_path, model=Path("other.gguf"))
    old = set(files(tmp_path))
    assert not keep(tmp_path, contents=(b"changed",))[1]
    assert len(files(tmp_path)) == 3
    assert len(old & set(files(tmp_path))) == 2


def test_a_start_that_fails_keeps_nothing(tmp_path):
    with pytest.raises(AssertionError, match="packed again"):
        keep(tmp_path, lambda _: unexpected())
    assert not files(tmp_path)


def test_a_folder_that_cannot_be_made_costs_a_warning_alone(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert not keep(tmp_path / "file" / "folder")[1]
    assert "packed weights not kept" in caplog.text


STARTED = """
import hashlib, runpy, sys
from pathlib import Path
here = runpy.run_path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
packed = []
panels, _ = here["keep"](Path(sys.argv[2]), lambda name: (packed.append(name), here["WEIGHTS"][name])[1])
print(len(packed), hashlib.sha256(b"".join(bytes(panels[name].data.numpy()) for name in sorted(panels))).hexdigest())
"""


def test_of_processes_that_start_together_one_packs_and_all_have_the_same(tmp_path):
    command = [sys.executable, "-c", STARTED, __file__, str(tmp_path)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        for _ in range(2)
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    found = [process.communicate(timeout=100)[0].split() for process in started]
    assert sorted(int(number) for number, _ in found) == [0, len(WEIGHTS)]
    assert found[0][1] == found[1][1]
    assert len(files(tmp_path)) == 1


def test_the_real_model_has_the_same_logits_to_the_bit_cold_and_warm(tmp_path, smollm2_path):
    model = tmp_path / "model.gguf"
    shutil.copy(smollm2_path, model)
    tokens = torch.randint(0, 49_000, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for _ in range(2):
        loaded = load_model(model, tmp_path / "kept", dtype=torch.bfloat16, device=CPU, quantised=True)
        runner = ModelRunner(loaded, KvArena(loaded.kv_layout(), 4, CPU))
        found.append(runner.run(Batch(items=(batch_item(tokens, 0, (0, 1, 2), sample=True),))).clone())
    (kept,) = files(tmp_path / "kept")
    assert str(kept) in Path("/proc/self/maps").read_text()
    assert found[0].equal(found[1])


def test_reading_says_nothing_of_a_file_that_is_not_there(tmp_path, caplog):
    assert read_packed(tmp_path / "none.safetensors", "key") is None
    assert not caplog.records
    assert PackedWeights().is_complete
