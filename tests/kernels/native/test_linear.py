"""Linear layers against fp64, over formats, odd sizes, rows and threads."""

import pytest
import torch

from headrace_kernels import native
from headrace_kernels.native import Buffer, Grid
from headrace_kernels.native.abi import Epilogue
from headrace_kernels.native.machine import Panels, Program

FORMATS = ["int4", "int8", "bf16"]


def dense(weight):
    return (weight.dequantise() if isinstance(weight, Grid) else weight).double()


def limit(x, weight):
    """Half a step of the inputs' int16 grid times the weights that it meets, and a random walk of fp32 roundings."""
    blocks = x.double().abs().view(x.shape[0], -1, 32).amax(2) / 32767
    products = x.double().abs() @ dense(weight).abs().T * 2**-24 * (4 + x.shape[1] ** 0.5)
    if not isinstance(weight, Grid):
        return products
    return (blocks / 2).repeat_interleave(32, dim=1) @ dense(weight).abs().T + products + 1e-30


def multiply(run, weight, x, *, threads=3, target=None, input_bits=16, **options):
    out = torch.full((x.shape[0], dense(weight).shape[0]), torch.nan) if target is None else target
    program = Program()
    program.linear(Panels(weight, input_bits), Buffer.ATTENDED, Buffer.QKV, **options)
    run(program, {Buffer.ATTENDED: x, Buffer.QKV: out}, num_rows=x.shape[0], threads=threads)
    return out


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 31, 200])
@pytest.mark.parametrize("size", [(16, 32), (48, 96), (33, 64), (7, 160), (96, 576)])
@pytest.mark.parametrize("form", FORMATS)
def test_products_equal_those_in_fp64(form, size, rows, random_weight, run):
    weight, x = random_weight(form, *size), torch.randn(rows, size[1], generator=torch.Generator().manual_seed(rows))
    found = multiply(run, weight, x)
    assert ((found.double() - x.double() @ dense(weight).T).abs() <= limit(x, weight)).all()


@pytest.mark.parametrize("form", FORMATS)
def test_more_rows_than_fit_into_the_cache_at_once(form, random_weight, run):
    weight, x = random_weight(form, 32, 1536), torch.randn(150, 1536)
    found = multiply(run, weight, x)
    assert ((found.double() - x.double() @ dense(weight).T).abs() <= limit(x, weight)).all()


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("form", FORMATS)
def test_the_number_of_threads_changes_no_bit(form, rows, random_weight, run):
    weight, x = random_weight(form, 80, 64), torch.randn(rows, 64)
    assert multiply(run, weight, x, threads=1).equal(multiply(run, weight, x, threads=3))


@pytest.mark.parametrize("form", FORMATS)
def test_a_row_is_the_same_alone_and_among_others_of_its_path(form, random_weight, run):
    weight, x = random_weight(form, 48, 96), torch.randn(37, 96)
    whole = multiply(run, weight, x)
    assert whole[:9].equal(multiply(run, weight, x[:9].clone()))
    assert multiply(run, weight, x[:4].clone())[:1].equal(multiply(run, weight, x[:1].clone())) or form == "bf16"


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("form", FORMATS)
def test_the_input_is_normalised_and_a_bias_added(form, rows, random_weight, run):
    weight, x = random_weight(form, 40, 64), torch.randn(rows, 64) * 5
    norm, bias = torch.rand(64) + 0.5, torch.randn(48)
    normed = x.double() / (x.double().pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * norm
    found = multiply(run, weight, x, norm=(norm, 1e-5), bias=bias)
    wanted = normed @ dense(weight).T + bias[:40]
    assert ((found.double() - wanted).abs() <= 2 * limit(normed.float(), weight) + 1e-5).all()


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("form", FORMATS)
def test_products_are_added_to_what_was_there(form, rows, random_weight, run):
    weight, x, before = random_weight(form, 24, 64), torch.randn(rows, 64), torch.randn(rows, 24)
    found = multiply(run, weight, x, epilogue=Epilogue.ADD, target=before.clone())
    plain = multiply(run, weight, x)
    torch.testing.assert_close(found, before + plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("epilogue", "gate_of"),
    [
        (Epilogue.SILU, torch.nn.functional.silu),
        (Epilogue.GELU, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
)
@pytest.mark.parametrize("rows", [1, 9])
def test_gates_open_their_ups(rows, epilogue, gate_of, run):
    gate, up, x = torch.randn(24, 64), torch.randn(24, 64), torch.randn(rows, 64)
    x[0] *= 40  # far out, where exp would overflow
    out = torch.full((rows, 24), torch.nan)
    found = multiply(run, native.interleave(gate, up), x, epilogue=epilogue, target=out)
    wide = x.double()
    wanted = gate_of(wide @ gate.bfloat16().double().T) * (wide @ up.bfloat16().double().T)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("form", FORMATS)
def test_only_sampled_rows_reach_the_logits(form, random_weight, run):
    weight, x = random_weight(form, 40, 32), torch.randn(12, 32)
    wanted_rows = torch.tensor([11, 0, 4, 5, 9, 2])
    out = torch.full((6, 40), torch.nan)
    program = Program()
    program.linear(Panels(weight), Buffer.HIDDEN, Buffer.LOGITS)
    run(
        program,
        {Buffer.HIDDEN: x, Buffer.LOGITS: out},
        num_rows=12,
        num_samples=6,
        sample_rows=wanted_rows,
    )
    chosen = x[wanted_rows]
    assert ((out.double() - chosen.double() @ dense(weight).T).abs() <= limit(chosen, weight)).all()


@pytest.mark.parametrize("form", ["int4", "int8"])
@pytest.mark.parametrize("value", [0.0, 1e-39, 1e30, 3e-12])
def test_inputs_of_any_magnitude_keep_their_precision(form, value, random_weight, run):
    weight, x = random_weight(form, 16, 64), torch.randn(3, 64) * value
    found = multiply(run, weight, x)
    assert ((found.double() - x.double() @ dense(weight).T).abs() <= limit(x, weight) + 1e-36).all()


def test_a_block_of_large_inputs_does_not_coarsen_the_others(random_weight, run):
    weight, x = random_weight("int4", 16, 64), torch.randn(1, 64)
    x[:, :32] *= 1e5
    weight.codes[:, :32], weight.minima[:, :1] = 0, 0
    found = multiply(run, weight, x)
    torch.testing.assert_close(found.double(), x[:, 32:].double() @ dense(weight)[:, 32:].T, rtol=1e-4, atol=1e-3)


def test_a_normalised_buffer_is_added(run):
    x, total, weight = torch.randn(5, 48), torch.randn(5, 48), torch.rand(48)
    wanted = total + x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * weight
    program = Program()
    program.norm_add(Buffer.PROJECTED, Buffer.HIDDEN, weight, 1e-6)
    run(program, {Buffer.PROJECTED: x, Buffer.HIDDEN: total}, num_rows=5)
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-6)


def rounded(x):
    """Inputs on the int8 grid: a scale per row and 32 inputs."""
    blocks = x.double().view(x.shape[0], -1, 32)
    scales = blocks.abs().amax(2, keepdim=True).float().double() / 127
    return torch.where(scales > 0, (blocks / scales).round() * scales, 0.0).view_as(x)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 31, 200])
@pytest.mark.parametrize("size", [(16, 32), (48, 96), (33, 64), (7, 160), (96, 576), (32, 1536)])
def test_int8_inputs_meet_int4_weights_exactly(size, rows, random_weight, run):
    weight, x = random_weight("int4", *size), torch.randn(rows, size[1], generator=torch.Generator().manual_seed(rows))
    found = multiply(run, weight, x, input_bits=8)
    # fp32 may round an input that lies between two codes to the other one.
    spare = (x.abs().amax() / 127 * 1e-3) * dense(weight).abs().sum(1) + 1e-4
    assert ((found.double() - rounded(x) @ dense(weight).T).abs() <= spare).all()
    assert not found.equal(multiply(run, weight, x))


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_the_largest_int8_products_do_not_overflow(rows, random_weight, run):
    weight, x = random_weight("int4", 32, 96), torch.ones(rows, 96)
    weight.codes.fill_(15)
    for sign in (1, -1):
        found = multiply(run, weight, sign * x, input_bits=8)
        torch.testing.assert_close(found.double(), sign * x.double() @ dense(weight).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["int8", "bf16"])
@pytest.mark.parametrize("rows", [1, 9])
def test_other_weights_take_no_notice_of_the_inputs_bits(form, rows, random_weight, run):
    weight, x = random_weight(form, 48, 96), torch.randn(rows, 96)
    assert multiply(run, weight, x, input_bits=8).equal(multiply(run, weight, x))


def test_what_is_not_a_number_does_not_vanish_in_a_gate(run):
    gate, up, x = torch.randn(24, 64), torch.randn(24, 64), torch.randn(2, 64)
    x[1, 5] = torch.nan
    out = torch.zeros(2, 24)
    found = multiply(run, native.interleave(gate, up), x, epilogue=Epilogue.SILU, target=out)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()
