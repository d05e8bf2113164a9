"""The C heap of a process that computes in a thread."""

import ctypes

_M_ARENA_MAX = -8


def share_one_heap() -> bool:
    """Let all threads allocate from one heap; call before there are others. Return whether the C library can.

    glibc gives each thread a heap of pieces of 64 MiB. When the engine's piece is full of what lives long, each tensor
    of a step maps another piece and unmaps it, and each unmapping stops all cores: after a dozen prompts 35,000 calls
    per prompt of 4,000 tokens, which took 1.1 instead of 0.72 s from its last piece to its first token (2-core Xeon,
    2026-11-22).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # Another C library: its heaps are its own affair.
        return False
    return bool(mallopt(_M_ARENA_MAX, 1))
