"""Models from a path: a GGUF file, or a Hugging Face folder with safetensors."""

from dataclasses import dataclass
from pathlib import Path

import torch

from headrace.core.block import KvLayout
from headrace.engine.models.decoder import Decoder, build_decoder
from headrace.engine.models.fingerprint import content_digests, fingerprint
from headrace.engine.models.gguf import GgufFile
from headrace.engine.models.native import NativeDecoder, can_run
from headrace.engine.models.packed import kept_packed
from headrace.engine.models.safetensors import SafetensorsFolder, weight_files
from headrace.engine.models.spec import ModelSpec
from headrace.errors import ConfigError

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
    """

    spec: ModelSpec
    decoder: Decoder | NativeDecoder
    contents: tuple[bytes, ...]
    dtype: torch.dtype
    device: torch.device
    is_quantised: bool = False
    input_bits: int = 16

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
    source, files = _open(path)
    is_native = dtype == torch.bfloat16 and device.type == "cpu" and can_run(source.spec)
    is_quantised = is_native and quantised and source.has_grid
    if input_bits == 8 and not is_quantised:
        raise ConfigError(
            f"int8 inputs need weights in a quantised grid and the C++ kernels; found "
            f"{'no kernels for this model on this machine' if source.has_grid else 'no such weights'}",
            field="dtype",
        )
    contents = content_digests(files)
    decoder: Decoder | NativeDecoder
    if is_quantised or (is_native and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        threads = torch.get_num_threads()
        with kept_packed(cache_dir, path, contents, "grid" if is_quantised else "bf16") as packed:
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


def _open(path: Path) -> tuple[GgufFile | SafetensorsFolder, tuple[Path, ...]]:
    if path.is_file() and path.suffix == ".gguf":
        return GgufFile(path), (path,)
    if (path / "config.json").is_file():
        return SafetensorsFolder(path), (path / "config.json", *weight_files(path))
    candidates = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(candidates) == 1:
        return GgufFile(candidates[0]), (candidates[0],)
    raise ConfigError(
        f"{path}: wanted a .gguf file, a folder with config.json, or a folder with one .gguf file; "
        f"found {f'{len(candidates)} .gguf files' if path.is_dir() else 'neither'}",
        field="model",
    )
