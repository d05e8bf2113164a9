"""A digest that two workers share if and only if their KV blocks are interchangeable."""

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import blake3

from headrace.core.block import KvLayout
from headrace_kernels import KERNEL_VERSION


def content_digests(files: Sequence[Path]) -> tuple[bytes, ...]:
    """Return a digest of what each file holds; all cores read, since a start waits for it.

    Raises:
        OSError: A file cannot be read.
    """
    return tuple(blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(file).digest() for file in files)


def fingerprint(contents: Sequence[bytes], layout: KvLayout, weights: str) -> str:
    """Return the fingerprint of a model as it is served.

    Args:
        contents: Digests of all files that decide the weights, in a fixed order.
        layout: Form and dtype of a block.
        weights: Form of the weights: a dtype, or "grid" for the quantised one of the files.

    Returns:
        64 hex digits over content, layout, weights and kernel version.
    """
    hasher = blake3.blake3(b"headrace-model-1\0")
    for content in contents:
        hasher.update(content)
    hasher.update(repr((astuple(layout), weights, KERNEL_VERSION)).encode())
    return str(hasher.hexdigest())
