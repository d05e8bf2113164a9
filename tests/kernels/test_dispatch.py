import torch

from headrace_kernels.dispatch import Implementations


def test_a_device_or_dtype_without_its_own_implementation_gets_the_reference():
    operation = Implementations(reference=lambda: "reference", fast={("cpu", torch.float32): lambda: "fast"})
    assert operation.choose(torch.device("cpu"), torch.float32)() == "fast"
    assert operation.choose(torch.device("cpu"), torch.float64)() == "reference"
    assert operation.choose(torch.device("cuda", 1), torch.float32)() == "reference"
