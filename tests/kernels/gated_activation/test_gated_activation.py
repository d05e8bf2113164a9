import math

import pytest
import torch

from headrace_kernels.gated_activation import gelu_and_mul, silu_and_mul


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("operation", "activation"), [(silu_and_mul, silu), (gelu_and_mul, gelu_tanh)])
@pytest.mark.parametrize("shape", [(1, 2), (5, 66), (2, 3, 16)])
def test_the_first_half_is_activated_and_gates_the_second(shape, operation, activation, dtype):
    x = torch.randn(shape).to(dtype)
    before = x.clone()
    gate, up = x.double().chunk(2, dim=-1)
    eps = torch.finfo(dtype).eps
    found = operation(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), activation(gate) * up, rtol=4 * eps, atol=2 * eps)
    assert torch.equal(x, before)


@pytest.mark.parametrize("operation", [silu_and_mul, gelu_and_mul])
def test_an_odd_last_dimension_is_refused(operation):
    with pytest.raises(ValueError, match="gate and up"):
        operation(torch.zeros(2, 3))
