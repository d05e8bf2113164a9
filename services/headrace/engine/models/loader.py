"""Models from a path: a GGUF file, or a Hugging Face folder with safetensors."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from headrace.clock import Clock
from headrace.core.block import KvLayout
from headrace.engine.cores import Cores
from headrace.engine.kept_file import KeptFile, processor
from headrace.engine.models.decoder import Decoder, build_decoder
from headrace.engine.models.fingerprint import content_digests, fingerprint
from headrace.engine.models.gguf import GgufFile
from headrace.engine.models.native import NativeDecoder, can_run
from headrace.engine.models.packed import kept_packed
from headrace.engine.models.row_paths import (
    LIMIT_S,
    FirstLayers,
    RowsDecoder,
    RowTable,
    first_layers,
    keep_table,
    known_table,
    measure,
)
from headrace.engine.models.safetensors import SafetensorsFolder, weight_files
from headrace.engine.models.spec import ModelSpec
from headrace.errors import ConfigError
from headrace_kernels import KERNEL_VERSION, native

logger = logging.getLogger(__name__)

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
"""Name in a KvLayout of each dtype a model can compute in."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A loaded model.

    Attributes:
        spec: What it is made of.
        decoder: Its weights and computation.
        contents: Digests of the files that decide its weights.
        dtype: Dtype of KV, and of weights and activations unless the decoder has finer ones.
        device: Where it computes.
        is_quantised: Whether weights are in the quantised grid of the files.
        input_bits: What the inputs of quantised layers are rounded to: 16, finer than bf16, or 8.
        row_table: What was measured to choose a path per number of rows; None where there is nothing to choose.
    """

    spec: ModelSpec
    decoder: Decoder | NativeDecoder | RowsDecoder
    contents: tuple[bytes, ...]
    dtype: torch.dtype
    device: torch.device
    is_quantised: bool = False
    input_bits: int = 16
    row_table: RowTable | None = None

    def kv_layout(self, block_tokens: int = 16) -> KvLayout:
        """Return the form of its KV blocks."""
        return KvLayout(
            num_layers=len(self.spec.layers),
            block_tokens=block_tokens,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            dtype=DTYPE_NAMES[self.dtype],
        )

    def fingerprint(self, layout: KvLayout) -> str:
        """Return the digest of weights, layout, dtype and kernels."""
        # Not of `row_table`: either path is within the error of bf16, and workers on one kind of processor must take
        # each other's blocks whatever noise one of them measured.
        weights = f"grid, {self.input_bits}-bit inputs" if self.is_quantised else DTYPE_NAMES[self.dtype]
        return fingerprint(self.contents, layout, weights)


def load_model(
    path: Path,
    cache_dir: Path | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantised: bool = False,
    input_bits: int = 16,
) -> Model:
    """Load a model.

    On a CPU without bf16 instructions, and for quantised weights on any CPU, the C++ kernels compute where they
    can: with fp32 activations, so never coarser than what was asked for.

    Args:
        path: A `.gguf` file, a folder with `config.json` and `*.safetensors`, or a folder with one `.gguf` file.
        cache_dir: Where weights packed for the C++ kernels are kept for the next start; None packs at each.
        dtype: torch.float32 or torch.bfloat16.
        device: Where weights go.
        quantised: Whether weights stay in the quantised grid of the files, if they have one and the device has
            kernels for it; takes less memory and time than bf16 and rounds nothing.
        input_bits: 16, or 8 to round the inputs of quantised layers that bear it to int8: faster and coarser.

    Raises:
        ConfigError: The path holds no model that can be served, or inputs cannot be rounded to int8 here; the
            message says what was found.
    """
    if dtype not in DTYPE_NAMES:
        raise ConfigError(f"wanted dtype {' or '.join(DTYPE_NAMES.values())}; found {dtype}", field="dtype")
    return _load(_open(path), cache_dir, dtype=dtype, device=device, quantised=quantised, input_bits=input_bits)


def load_auto(path: Path, cache_dir: Path | None = None, *, device: torch.device, cores: Cores, clock: Clock) -> Model:
    """Load a model in the best precision that is fast here, never worse than bf16, and choose its path by rows.

    Where the C++ kernels compute, a few layers are timed against torch's bf16 at every start. If torch is clearly
    faster from some number of rows on, such steps take it, and its weights are loaded too: 2 bytes per weight besides
    the kernels' own, 6 on a CPU without bf16 instructions.

    Args:
        path: As for `load_model`.
        cache_dir: As for `load_model`; the least times of all starts are kept there too.
        device: Where weights go.
        cores: What the worker will compute on, and takes turns with other workers for.
        clock: Measures.

    Raises:
        ConfigError: The path holds no model that can be served; the message says what was found.
    """
    opened = _open(path)
    model = _load(opened, cache_dir, dtype=torch.bfloat16, device=device, quantised=True)
    if not isinstance(model.decoder, NativeDecoder):
        return model
    table = _row_table(model, opened.source, cache_dir, cores, clock)
    model = replace(model, row_table=table)
    if table.torch_from is None:
        return model
    plain = build_decoder(model.spec, opened.source, dtype=torch.bfloat16, device=device)
    decoder = RowsDecoder(model.decoder, plain, torch_from=table.torch_from, most_threads=cores.most_threads)
    return replace(model, decoder=decoder)


def _row_table(
    model: Model, source: GgufFile | SafetensorsFolder, folder: Path | None, cores: Cores, clock: Clock
) -> RowTable:
    """Measure, and join with what earlier starts kept; workers that start together take turns at that."""
    kept = None if folder is None else _row_file(folder, model, cores)
    with cores.turn(LIMIT_S), cores:
        known = known_table(kept)
        table = _measured(model, source, cores, clock, known)
        if table != known:
            keep_table(kept, table)
    logger.info(
        "times by number of rows",
        extra={
            "rows": table.rows,
            "native_to_torch": [round(gain, 2) for gain in table.gains],
            "torch_from": table.torch_from,
            "was_known": known is not None,
        },
    )
    return table


def _row_file(folder: Path, model: Model, cores: Cores) -> KeptFile:
    return KeptFile(
        folder,
        "rows",
        {
            "contents": " ".join(digest.hex() for digest in model.contents),
            "form": "grid" if model.is_quantised else "bf16",
            "layers": len(first_layers(model.spec).layers),
            "threads": cores.most_threads,
            "processor": processor(),
            "kernels": f"{KERNEL_VERSION}, {native.build().name}",
            "torch": torch.__version__,
        },
    )


def _measured(
    model: Model, source: GgufFile | SafetensorsFolder, cores: Cores, clock: Clock, known: RowTable | None
) -> RowTable:
    spec, weights = first_layers(model.spec), FirstLayers(source)
    return measure(
        NativeDecoder(spec, weights, quantised=model.is_quantised, most_threads=torch.get_num_threads()),
        build_decoder(spec, weights, dtype=model.dtype, device=model.device),
        spec,
        cores.share,
        clock,
        known=known,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Opened:
    """A model's files: where, what they hold, and which decide the weights."""

    path: Path
    source: GgufFile | SafetensorsFolder
    files: tuple[Path, ...]


def _load(
    opened: _Opened,
    cache_dir: Path | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantised: bool,
    input_bits: int = 16,
) -> Model:
    source = opened.source
    is_native = dtype == torch.bfloat16 and device.type == "cpu" and can_run(source.spec)
    is_quantised = is_native and quantised and source.has_grid
    if input_bits == 8 and not is_quantised:
        raise ConfigError(
            f"int8 inputs need weights in a quantised grid and the C++ kernels; found "
            f"{'no kernels for this model on this machine' if source.has_grid else 'no such weights'}",
            field="dtype",
        )
    contents = content_digests(opened.files)
    decoder: Decoder | NativeDecoder
    if is_quantised or (is_native and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        threads = torch.get_num_threads()
        with kept_packed(cache_dir, opened.path, contents, "grid" if is_quantised else "bf16") as packed:
            decoder = NativeDecoder(
                source.spec, source, packed, quantised=is_quantised, most_threads=threads, input_bits=input_bits
            )
    else:
        decoder = build_decoder(source.spec, source, dtype=dtype, device=device)
    return Model(
        spec=source.spec,
        decoder=decoder,
        contents=contents,
        dtype=dtype,
        device=device,
        is_quantised=is_quantised,
        input_bits=input_bits,
    )


def _open(path: Path) -> _Opened:
    if path.is_file() and path.suffix == ".gguf":
        return _Opened(path=path, source=GgufFile(path), files=(path,))
    if (path / "config.json").is_file():
        source = SafetensorsFolder(path)
        return _Opened(path=path, source=source, files=(path / "config.json", *weight_files(path)))
    candidates = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(candidates) == 1:
        return _Opened(path=path, source=GgufFile(candidates[0]), files=(candidates[0],))
    raise ConfigError(
        f"{path}: wanted a .gguf file, a folder with config.json, or a folder with one .gguf file; "
        f"found {f'{len(candidates)} .gguf files' if path.is_dir() else 'neither'}",
        field="model",
    )
