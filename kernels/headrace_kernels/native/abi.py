"""The structures of `csrc/step.h`, field by field, and the library's functions."""

import ctypes
from enum import IntEnum
from typing import ClassVar

_I32, _I64, _F32, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

NUM_BUFFERS = 6


class Format(IntEnum):
    """How the weights of a panel are coded."""

    INT4 = 0
    INT8 = 1
    BF16 = 2


class Epilogue(IntEnum):
    """What happens to finished products."""

    STORE = 0
    ADD = 1
    SILU = 2
    GELU = 3


class Kind(IntEnum):
    """Which structure an operation points to."""

    EMBED = 0
    LINEAR = 1
    ATTEND = 2
    NORM_ADD = 3


class Linear(ctypes.Structure):
    """A linear layer with the normalisation before it and what follows it."""

    _fields_: ClassVar = [
        ("format", _I32),
        ("in_size", _I32),
        ("out_size", _I32),
        ("epilogue", _I32),
        ("source", _I32),
        ("target", _I32),
        ("on_samples", _I32),
        ("norm_eps", _F32),
        ("input_bits", _I32),
        ("padding", _I32),
        ("norm_weight", _POINTER),
        ("bias", _POINTER),
        ("panels", _POINTER),
    ]


class Attend(ctypes.Structure):
    """Rotary embedding, KV write and attention of one layer."""

    _fields_: ClassVar = [
        ("heads", _I32),
        ("kv_heads", _I32),
        ("head_dim", _I32),
        ("layer", _I32),
        ("rope", _I32),
        ("window", _I32),
        ("source", _I32),
        ("target", _I32),
        ("scale", _F32),
        ("soft_cap", _F32),
        ("norm_eps", _F32),
        ("padding", _I32),
        ("q_norm", _POINTER),
        ("k_norm", _POINTER),
    ]


class Embed(ctypes.Structure):
    """Rows of the embedding table."""

    _fields_: ClassVar = [("format", _I32), ("size", _I32), ("target", _I32), ("scale", _F32), ("panels", _POINTER)]


class NormAdd(ctypes.Structure):
    """A normalised buffer added to another."""

    _fields_: ClassVar = [
        ("size", _I32),
        ("source", _I32),
        ("target", _I32),
        ("norm_eps", _F32),
        ("norm_weight", _POINTER),
    ]


class Op(ctypes.Structure):
    """One operation of a model."""

    _fields_: ClassVar = [("kind", _I32), ("padding", _I32), ("what", _POINTER)]


class Step(ctypes.Structure):
    """A batch and the memory that it reads and writes."""

    _fields_: ClassVar = [
        ("num_rows", _I64),
        ("num_sequences", _I64),
        ("num_samples", _I64),
        ("table_width", _I64),
        ("token_ids", _POINTER),
        ("positions", _POINTER),
        ("write_blocks", _POINTER),
        ("write_slots", _POINTER),
        ("cu_seqlens", _POINTER),
        ("block_tables", _POINTER),
        ("kv_lengths", _POINTER),
        ("sample_rows", _POINTER),
        ("slot_positions", _POINTER),
        ("arena", _POINTER),
        ("num_layers", _I64),
        ("block_tokens", _I64),
        ("buffers", _POINTER * NUM_BUFFERS),
        ("num_ropes", _I64),
        ("frequencies", _POINTER),
        ("rope_size", _I64),
    ]


def declare(library: ctypes.CDLL) -> None:
    """Set argument and result types; the library's calls release the interpreter's lock."""
    library.headrace_sizes.argtypes = [ctypes.c_int]
    library.headrace_sizes.restype = ctypes.c_int64
    library.headrace_open.argtypes = [ctypes.c_int]
    library.headrace_open.restype = ctypes.c_void_p
    library.headrace_close.argtypes = [ctypes.c_void_p]
    library.headrace_close.restype = None
    library.headrace_begin.argtypes = [ctypes.c_void_p, ctypes.POINTER(Step), *[ctypes.c_int] * 2]
    library.headrace_begin.restype = None
    library.headrace_run.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(Op),
        ctypes.c_int64,
        ctypes.POINTER(Step),
        ctypes.c_int,
    ]
    library.headrace_run.restype = None
