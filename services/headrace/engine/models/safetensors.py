"""Specs and weights from a folder with `config.json` and safetensors files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from headrace.engine.models.spec import (
    Activation,
    Architecture,
    Llama3Scaling,
    ModelSpec,
    RopeSpec,
    architecture,
    layer_specs,
    require,
)
from headrace.engine.models.weights import MODEL_WEIGHTS, check_weight, layer_weights
from headrace.errors import ConfigError

_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU,
    # Gemma's first files say gelu and mean the approximation (transformers issue 29402).
    "gelu": Activation.GELU,
}


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a folder, by name.

    Raises:
        ConfigError: There are none.
    """
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise ConfigError(f"{folder}: wanted *.safetensors; there are none", field="model")
    return files


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...


class _TensorFile(Protocol):
    """What is used of safetensors' reader, which has no types."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> _Slice: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


class SafetensorsFolder:
    """A Hugging Face model folder: a spec and a WeightSource.

    Args:
        folder: Holds config.json and one or more safetensors files.

    Raises:
        ConfigError: Something is missing or unreadable, or the architecture is unknown.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config = _read_json(folder / "config.json")
        self._architecture = architecture(str(require(config, "model_type", str(folder / "config.json"))))
        self.spec = _ConfigReader(config, folder / "config.json", self._architecture).spec(
            _eos_token_ids(folder, config)
        )
        self._files: dict[str, _TensorFile] = {}
        for file in weight_files(folder):
            try:
                opened = cast("_TensorFile", safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise ConfigError(f"{file}: wanted a safetensors file; {error}", field="model") from error
            self._files.update(dict.fromkeys(opened.keys(), opened))

    @property
    def has_grid(self) -> bool:
        """Whether any weight is in a quantised grid: none is."""
        return False

    def has(self, name: str, layer: int | None = None) -> bool:
        """Return whether the files hold the weight."""
        return self._file_name(name, layer, "weight") in self._files

    def read_grid(self, name: str, shape: tuple[int, int], layer: int | None = None) -> None:
        """Return None: these files keep weights in no grid."""

    def read(
        self, name: str, shape: tuple[int, ...], layer: int | None = None, *, kind: str = "weight"
    ) -> torch.Tensor:
        """Return a weight in the dtype of the file."""
        file_name = self._file_name(name, layer, kind)
        opened = self._files.get(file_name)
        found = None if opened is None else tuple(opened.get_slice(file_name).get_shape())
        check_weight(self._folder, file_name, found, shape)
        return self._files[file_name].get_tensor(file_name)

    def _file_name(self, name: str, layer: int | None, kind: str) -> str:
        if layer is None:
            return f"{MODEL_WEIGHTS[name].hugging_face}.{kind}"
        names = layer_weights(has_post_norms=self._architecture.has_post_norms)
        return f"model.layers.{layer}.{names[name].hugging_face}.{kind}"


class _ConfigReader:
    """Turns config.json into a ModelSpec."""

    def __init__(self, config: Mapping[str, object], path: Path, row: Architecture) -> None:
        self._config = config
        self._path = path
        self._row = row

    def spec(self, eos_token_ids: frozenset[int]) -> ModelSpec:
        """Return the spec; raises ConfigError for a missing key or an unknown value."""
        hidden, heads = self._integer("hidden_size"), self._integer("num_attention_heads")
        head_dim = self._integer("head_dim", hidden // heads)
        bias = bool(self._config.get("attention_bias"))
        return ModelSpec(
            architecture=self._row,
            vocab_size=self._integer("vocab_size"),
            hidden_size=hidden,
            mlp_size=self._integer("intermediate_size"),
            num_heads=heads,
            num_kv_heads=self._integer("num_key_value_heads", heads),
            head_dim=head_dim,
            layers=layer_specs(self._windows(), self._rope("full_attention"), self._rope("sliding_attention")),
            max_context_tokens=self._integer("max_position_embeddings"),
            norm_eps=self._number("rms_norm_eps", 1e-6),
            attention_scale=self._number("query_pre_attn_scalar", head_dim) ** -0.5,
            activation=self._activation(),
            attention_soft_cap=self._optional("attn_logit_softcapping"),
            logit_soft_cap=self._optional("final_logit_softcapping"),
            is_tied=bool(self._config.get("tie_word_embeddings", self._row.is_tied)),
            has_qkv_bias=self._row.has_qkv_bias or bias,
            has_output_bias=bias,
            has_mlp_bias=bool(self._config.get("mlp_bias")),
            norm_offset=self._row.norm_offset,
            eos_token_ids=eos_token_ids,
        )

    def _activation(self) -> Activation:
        name = self._config.get("hidden_activation") or self._config.get("hidden_act") or self._row.activation.value
        if name not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ConfigError(f"{self._path}: wanted an activation of {known}; found {name}", field="hidden_act")
        return _ACTIVATIONS[str(name)]

    def _windows(self) -> tuple[int | None, ...]:
        layers = self._integer("num_hidden_layers")
        window = self._optional("sliding_window")
        if window is None or self._config.get("use_sliding_window") is False:
            return (None,) * layers
        kinds = self._config.get("layer_types")
        if isinstance(kinds, list):
            if len(kinds) != layers:
                raise ConfigError(f"{self._path}: wanted {layers} layer_types; found {len(kinds)}", field="layer_types")
            return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
        if "max_window_layers" in self._config:
            return tuple(int(window) if i >= self._integer("max_window_layers") else None for i in range(layers))
        return self._row.windows(layers, int(window))

    def _rope(self, layer_type: str) -> RopeSpec:
        """Read the rotary embedding of a kind of layer; its keys changed with transformers 5."""
        found = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        values = cast("dict[str, object]", found)
        if layer_type in values:
            values = cast("dict[str, object]", values[layer_type])
        elif layer_type == "sliding_attention" and self._row.window_theta is not None:
            return RopeSpec(theta=self._number("rope_local_base_freq", self._row.window_theta))
        theta = float(str(values.get("rope_theta", self._config.get("rope_theta", 10_000.0))))
        kind = values.get("rope_type", values.get("type", "default"))
        if kind == "default":
            return RopeSpec(theta=theta)
        if kind == "linear":
            return RopeSpec(theta=theta, linear_factor=float(str(require(values, "factor", str(self._path)))))
        if kind == "llama3":
            return RopeSpec(theta=theta, llama3=self._llama3(values))
        raise ConfigError(
            f"{self._path}: wanted rope scaling default, linear or llama3; found {kind}", field="rope_scaling"
        )

    def _llama3(self, values: Mapping[str, object]) -> Llama3Scaling:
        def number(key: str) -> float:
            return float(str(require(values, key, str(self._path))))

        return Llama3Scaling(
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_max_position_embeddings=int(number("original_max_position_embeddings")),
        )

    def _optional(self, key: str) -> float | None:
        value = self._config.get(key)
        return None if value is None else float(str(value))

    def _number(self, key: str, default: float) -> float:
        value = self._optional(key)
        return default if value is None else value

    def _integer(self, key: str, default: int | None = None) -> int:
        if default is not None and self._config.get(key) is None:
            return default
        return int(str(require(self._config, key, str(self._path))))


def _read_json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: wanted a JSON object; {error}", field="model") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: wanted a JSON object; found {type(found).__name__}", field="model")
    return found


def _eos_token_ids(folder: Path, config: Mapping[str, object]) -> frozenset[int]:
    """Return the end tokens; generation_config.json knows more of them than config.json."""
    generation = folder / "generation_config.json"
    found = _read_json(generation).get("eos_token_id") if generation.exists() else None
    found = config.get("eos_token_id") if found is None else found
    if found is None:
        return frozenset()
    return frozenset(int(str(token)) for token in (found if isinstance(found, list) else [found]))
