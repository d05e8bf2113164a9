"""C++ kernels of the CPU: a whole model step in one call per layer, threads included."""

from headrace_kernels.native.build import NativeUnavailable, build, cache_dir, is_available, library
from headrace_kernels.native.machine import Buffer, Machine, Program
from headrace_kernels.native.pack import Grid, Packed, interleave, join, pack

__all__ = [
    "Buffer",
    "Grid",
    "Machine",
    "NativeUnavailable",
    "Packed",
    "Program",
    "build",
    "cache_dir",
    "interleave",
    "is_available",
    "join",
    "library",
    "pack",
]
