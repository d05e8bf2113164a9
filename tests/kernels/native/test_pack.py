"""Weights in panels: what goes in comes out."""

import pytest
import torch

from headrace_kernels import native
from headrace_kernels.native import Buffer, Grid, abi
from headrace_kernels.native.machine import Panels, Program


@pytest.mark.parametrize("size", [(16, 32), (17, 64), (40, 96), (5, 160)])
@pytest.mark.parametrize("form", ["int4", "int8", "bf16"])
def test_a_row_of_the_panels_is_the_row_of_the_weight(form, size, random_weight, run):
    weight = random_weight(form, *size)
    dense = weight if form == "bf16" else weight.dequantise()
    tokens = torch.arange(size[0]).flip(0)
    out = torch.full((size[0], size[1]), torch.nan)
    program = Program()
    program.embed(Panels(weight), Buffer.HIDDEN, 2.0)
    run(program, {Buffer.HIDDEN: out}, num_rows=size[0], token_ids=tokens)
    torch.testing.assert_close(out, dense[tokens] * 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("form", "bytes_per_weight"), [("int4", 20 / 32), ("int8", 34 / 32), ("bf16", 2)])
def test_panels_take_no_more_memory_than_the_file(form, bytes_per_weight, random_weight):
    assert native.pack(random_weight(form, 32, 64)).numel() == 32 * 64 * bytes_per_weight


def test_joined_grids_have_the_rows_of_all(random_weight):
    first, second = random_weight("int4", 3, 32), random_weight("int4", 5, 32, seed=1)
    joined = native.join([first, second])
    assert joined.dequantise().equal(torch.cat([first.dequantise(), second.dequantise()]))
    assert native.join([first, random_weight("int8", 3, 32)]) is None


def test_gates_and_ups_lie_eight_by_eight():
    rows = native.interleave(torch.arange(16), torch.arange(16) + 100)
    assert rows.tolist() == [*range(8), *range(100, 108), *range(8, 16), *range(108, 116)]


@pytest.mark.parametrize("form", ["int8", "bf16"])
def test_inputs_come_in_whole_blocks(form, random_weight):
    weight = random_weight(form, 16, 64)
    if isinstance(weight, Grid):
        weight = Grid(codes=weight.codes[:, :63], scales=weight.scales, minima=None)
    else:
        weight = weight[:, :40]
    with pytest.raises(ValueError, match="multiples of 32"):
        native.pack(weight)


def test_structures_have_the_sizes_that_the_library_was_built_with():
    sizes = native.library().headrace_sizes
    names = (abi.Linear, abi.Attend, abi.Embed, abi.NormAdd, abi.Op, abi.Step)
    assert [sizes(index) for index in range(len(names))] == [abi.ctypes.sizeof(name) for name in names]
