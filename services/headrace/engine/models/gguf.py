"""Specs and weights from a GGUF file."""

from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, dequantize

from headrace.engine.models.spec import Architecture, ModelSpec, RopeSpec, architecture, layer_specs, require
from headrace.engine.models.weights import MODEL_WEIGHTS, check_weight, layer_weights
from headrace.errors import ConfigError


class _Reader(GGUFReader):
    """The package's reader over a plain array: slicing a memmap, a million times, takes most of its time."""

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
        except (OSError, ValueError, IndexError) as error:
            raise ConfigError(f"{path}: wanted a GGUF file; {error}", field="model") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        # Lists (vocabulary, merges) are left unread: a spec needs none.
        self._metadata: dict[str, object] = {
            key: item.contents() for key, item in reader.fields.items() if len(item.data) == 1
        }
        self._architecture = architecture(str(require(self._metadata, "general.architecture", str(path))))
        self.spec = self._read_spec(self._architecture)

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


def _halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the row order of llama.cpp's converter: pair i is rows 2i, 2i + 1 there, rows i, i + dim / 2 here."""
    pairs = weight.view(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
