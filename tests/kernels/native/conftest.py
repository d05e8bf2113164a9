"""Programs of native operations on small tensors."""

import ctypes

import pytest
import torch

from headrace_kernels import native
from headrace_kernels.native import Buffer, Grid, abi
from headrace_kernels.native.machine import buffers

THREADS = 3


@pytest.fixture(scope="session")
def machine():
    made = native.Machine(THREADS)
    yield made
    made.close()


@pytest.fixture(scope="session")
def run(machine):
    """Run a program over buffers given by name; the others are of one element."""

    def run_program(program, named, *, threads=THREADS, heads=(1, 1), **fields):
        tensors = [named.get(buffer, torch.zeros(1)) for buffer in Buffer]
        assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors)
        held = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
        numbers = {name: value for name, value in fields.items() if name not in held}
        addresses = {name: tensor.data_ptr() for name, tensor in held.items()}
        step = abi.Step(buffers=buffers(*tensors), **numbers, **addresses)
        operations = program.operations()
        machine.begin(step, threads, *heads)
        machine.run(operations, 0, len(program), step, threads)
        assert ctypes.sizeof(operations) == len(program) * ctypes.sizeof(abi.Op)

    return run_program


def random_weight(form, out_size, in_size, seed=0):
    """A weight in one of the forms: a grid, or a tensor that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    if form == "bf16":
        return torch.randn(out_size, in_size, generator=generator).to(torch.bfloat16).float()
    low, high = (0, 16) if form == "int4" else (-128, 128)
    shape = (out_size, in_size // 32)
    scales = (torch.rand(shape, generator=generator) + 0.1).to(torch.float16) / 8
    return Grid(
        codes=torch.randint(low, high, (out_size, in_size), generator=generator).to(
            torch.uint8 if form == "int4" else torch.int8
        ),
        scales=scales,
        minima=-torch.rand(shape, generator=generator).to(torch.float16) if form == "int4" else None,
    )


@pytest.fixture(name="random_weight", scope="session")
def random_weight_fixture():
    return random_weight
