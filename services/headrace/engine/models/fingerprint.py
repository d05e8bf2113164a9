"""A digest that two workers share if and only if their KV blocks are interchangeable."""

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import blake3

from headrace.core.block import KvLayout
from headrace_kernels import KERNEL_VERSION


def fingerprint(files: Sequence[Path], layout: KvLayout, weights: str) -> str:
    """Return the fingerprint of a model as it is served.

    Args:
        files: All files that decide the weights, in a fixed order; their content counts, not their names.
        layout: Form and dtype of a block.
        weights: Form of the weights: a dtype, or "grid" for the quantised one of the files.

    Returns:
        64 hex digits over content, layout, weights and kernel version.

    Raises:
        OSError: A file cannot be read.
    """
    hasher = blake3.blake3(b"headrace-model-1\0")
    for file in files:
        content = blake3.blake3()
        content.update_mmap(file)
        hasher.update(content.digest())
    hasher.update(repr((astuple(layout), weights, KERNEL_VERSION)).encode())
    return str(hasher.hexdigest())
