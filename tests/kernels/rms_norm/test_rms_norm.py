import pytest
import torch

from headrace_kernels.rms_norm import IMPLEMENTATIONS, rms_norm, rms_norm_with_residual


def wanted(x, weight, eps):
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 576), (7, 33), (3, 4, 64), (5, 1)])
def test_rows_are_divided_by_their_root_mean_square(shape, dtype):
    x, weight = (torch.randn(shape) * 10).to(dtype), torch.randn(shape[-1])
    eps = torch.finfo(dtype).eps
    for implementation in (rms_norm, IMPLEMENTATIONS.reference):
        found = implementation(x, weight, 1e-5)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted(x, weight, 1e-5), rtol=4 * eps, atol=eps)


def test_a_row_of_zeros_stays_finite():
    assert (rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6) == 0).all()


def test_large_bf16_rows_do_not_overflow_in_their_squares():
    assert rms_norm(torch.full((1, 64), 1e15, dtype=torch.bfloat16), torch.ones(64), 1e-6).isfinite().all()


def test_the_residual_is_added_first_and_returned():
    x, residual, weight = torch.randn(3, 16), torch.randn(3, 16), torch.randn(16)
    normed, total = rms_norm_with_residual(x, residual, weight, 1e-5)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, rms_norm(x + residual, weight, 1e-5))


def test_a_weight_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"weight: wanted shape \[8\]"):
        rms_norm(torch.zeros(2, 8), torch.ones(4), 1e-6)
