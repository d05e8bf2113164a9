"""Specs and weights from a GGUF file."""

import struct
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, dequantize

from headrace.engine.models.spec import Architecture, ModelSpec, RopeSpec, architecture, layer_specs, require
from headrace.engine.models.weights import MODEL_WEIGHTS, check_weight, layer_weights
from headrace.errors import ConfigError
from headrace_kernels.native import Grid

_ARRAY_HEAD_BYTES = 12
"""Kind of the elements and their number."""


class _Reader(GGUFReader):
    """The package's reader, without the contents of lists.

    It makes two arrays of every token of the vocabulary, and slices a memmap for each: 1.4 s of 100,000 tokens and
    merges, which a spec does not need (2-core Zen 3, 2026-11-21).
    """

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = (int(self._get(orig_offs + at, form)[0]) for at, form in ((0, np.uint32), (4, np.uint64)))
        begin = orig_offs + _ARRAY_HEAD_BYTES
        if kind == GGUFValueType.STRING:
            end = self._after_strings(begin, count)
        else:
            end = begin + count * np.dtype(self.gguf_scalar_to_np[GGUFValueType(kind)]).itemsize
        if end > self._plain.size:
            raise ValueError(f"a list of {count} ends at byte {end} of {self._plain.size}")
        return end - orig_offs, [], [], [GGUFValueType.ARRAY]

    def _after_strings(self, at: int, count: int) -> int:
        data = self._plain.data
        length_at = struct.Struct(">Q" if self.byte_order == "S" else "<Q").unpack_from
        try:
            for _ in range(count):
                at += 8 + length_at(data, at)[0]
        except (struct.error, OverflowError):
            raise ValueError(f"a list of {count} strings goes beyond the end of the file") from None
        return at

    @property  # type: ignore[override]
    def data(self) -> npt.NDArray[np.uint8]:
        return self._plain

    @data.setter
    def data(self, mapped: npt.NDArray[np.uint8]) -> None:
        self._plain = np.asarray(mapped)


class GgufFile:
    """One open GGUF file: a spec and a WeightSource.

    Args:
        path: The file.

    Raises:
        ConfigError: It is not a readable GGUF file, or its architecture is unknown.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            reader = _Reader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ConfigError(f"{path}: wanted a GGUF file; {error}", field="model") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._metadata: dict[str, object] = {
            key: item.contents() for key, item in reader.fields.items() if len(item.data) == 1
        }
        self._architecture = architecture(str(require(self._metadata, "general.architecture", str(path))))
        self.spec = self._read_spec(self._architecture)

    @property
    def has_grid(self) -> bool:
        """Whether any weight is in a grid that `read_grid` returns."""
        return any(tensor.tensor_type in _GRIDS for tensor in self._tensors.values())

    def has(self, name: str, layer: int | None = None) -> bool:
        """Return whether the file holds the weight."""
        return self._file_name(name, layer, "weight") in self._tensors

    def read(
        self, name: str, shape: tuple[int, ...], layer: int | None = None, *, kind: str = "weight"
    ) -> torch.Tensor:
        """Return a weight in fp32, dequantised, query and key rows in rotate-half order."""
        file_name = self._file_name(name, layer, kind)
        weight = self._dequantize(file_name)
        check_weight(self._path, file_name, None if weight is None else tuple(weight.shape), shape)
        weight = cast("torch.Tensor", weight)
        heads = {"q": self.spec.num_heads, "k": self.spec.num_kv_heads}.get(name)
        if heads is not None and self._architecture.is_permuted_in_gguf:
            return _halves_from_pairs(weight, heads)
        return weight

    def read_grid(self, name: str, shape: tuple[int, int], layer: int | None = None) -> Grid | None:
        """Return a weight in its own grid if the file keeps it as Q4_0, Q4_1 or Q8_0."""
        file_name = self._file_name(name, layer, "weight")
        tensor = self._tensors.get(file_name)
        unpack = None if tensor is None else _GRIDS.get(tensor.tensor_type)
        if tensor is None or unpack is None:
            return None
        blocks = torch.from_numpy(np.array(tensor.data)).view(shape[0], -1, tensor.data.shape[1] * 32 // shape[1])
        check_weight(self._path, file_name, (blocks.shape[0], blocks.shape[1] * 32), shape)
        grid = unpack(blocks)
        heads = {"q": self.spec.num_heads, "k": self.spec.num_kv_heads}.get(name)
        if heads is not None and self._architecture.is_permuted_in_gguf:
            return grid.rows(_halves_from_pairs(torch.arange(shape[0]), heads))
        return grid

    def _file_name(self, name: str, layer: int | None, kind: str) -> str:
        if layer is None:
            return f"{MODEL_WEIGHTS[name].gguf}.{kind}"
        return f"blk.{layer}.{layer_weights(has_post_norms=self._architecture.has_post_norms)[name].gguf}.{kind}"

    def _dequantize(self, file_name: str) -> torch.Tensor | None:
        tensor = self._tensors.get(file_name)
        if tensor is None:
            return None
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ConfigError(
                f"{self._path}: {file_name} is {tensor.tensor_type.name}, which cannot be read", field="model"
            ) from error
        # An fp32 weight is a view of the read-only file: torch wants memory that it may write.
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def _read_spec(self, row: Architecture) -> ModelSpec:
        hidden = self._integer("embedding_length")
        heads = self._integer("attention.head_count")
        head_dim = self._integer("attention.key_length", hidden // heads)
        layers = self._integer("block_count")
        tensors = self._tensors
        return ModelSpec(
            architecture=row,
            vocab_size=int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else 0,
            hidden_size=hidden,
            mlp_size=self._integer("feed_forward_length"),
            num_heads=heads,
            num_kv_heads=self._integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            layers=layer_specs(row.windows(layers, self._window(row)), self._rope(), self._window_rope(row)),
            max_context_tokens=self._integer("context_length"),
            norm_eps=self._number("attention.layer_norm_rms_epsilon", 1e-6),
            attention_scale=self._number("attention.scale", head_dim**-0.5),
            activation=row.activation,
            attention_soft_cap=self._optional("attn_logit_softcapping"),
            logit_soft_cap=self._optional("final_logit_softcapping"),
            is_tied="output.weight" not in tensors,
            has_qkv_bias="blk.0.attn_q.bias" in tensors or row.has_qkv_bias,
            has_output_bias="blk.0.attn_output.bias" in tensors,
            has_mlp_bias="blk.0.ffn_down.bias" in tensors,
            eos_token_ids=self._eos_token_ids(),
        )

    def _window(self, row: Architecture) -> int | None:
        window = self._optional("attention.sliding_window")
        return None if window is None or row.name == "qwen2" else int(window)

    def _rope(self) -> RopeSpec:
        kind = self._metadata.get(f"{self._architecture.name}.rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise ConfigError(f"{self._path}: wanted rope scaling none or linear; found {kind}", field="model")
        divisors = self._dequantize("rope_freqs.weight")
        return RopeSpec(
            theta=self._number("rope.freq_base", 10_000.0),
            linear_factor=self._number("rope.scaling.factor", 1.0) if kind == "linear" else 1.0,
            divisors=None if divisors is None else tuple(divisors.tolist()),
        )

    def _window_rope(self, row: Architecture) -> RopeSpec:
        return self._rope() if row.window_theta is None else RopeSpec(theta=row.window_theta)

    def _eos_token_ids(self) -> frozenset[int]:
        keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        return frozenset(int(str(self._metadata[key])) for key in keys if key in self._metadata)

    def _optional(self, key: str) -> float | None:
        value = self._metadata.get(f"{self._architecture.name}.{key}")
        return None if value is None else float(str(value))

    def _number(self, key: str, default: float) -> float:
        value = self._optional(key)
        return default if value is None else value

    def _integer(self, key: str, default: int | None = None) -> int:
        full_key = f"{self._architecture.name}.{key}"
        if default is not None and full_key not in self._metadata:
            return default
        return int(str(require(self._metadata, full_key, str(self._path))))


def _int4(blocks: torch.Tensor, head_bytes: int) -> torch.Tensor:
    """Return the codes of blocks of 32: the first 16 in low nibbles, the others in high ones."""
    nibbles = blocks[:, :, head_bytes:]
    return torch.cat([nibbles & 15, nibbles >> 4], dim=2).flatten(1)


def _q4_0(blocks: torch.Tensor) -> Grid:
    scales = blocks[:, :, :2].contiguous().view(torch.float16).squeeze(2)
    return Grid(codes=_int4(blocks, 2), scales=scales, minima=scales * -8)


def _q4_1(blocks: torch.Tensor) -> Grid:
    scales, minima = blocks[:, :, :4].contiguous().view(torch.float16).unbind(2)
    return Grid(codes=_int4(blocks, 4), scales=scales, minima=minima)


def _q8_0(blocks: torch.Tensor) -> Grid:
    scales = blocks[:, :, :2].contiguous().view(torch.float16).squeeze(2)
    return Grid(codes=blocks[:, :, 2:].contiguous().view(torch.int8).flatten(1), scales=scales, minima=None)


_GRIDS = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
}


def _halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the row order of llama.cpp's converter: pair i is rows 2i, 2i + 1 there, rows i, i + dim / 2 here."""
    pairs = weight.view(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
