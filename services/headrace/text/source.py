"""Read tokenizer and chat template from a GGUF file or a Hugging Face folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from headrace.errors import ConfigError
from headrace.text.gguf_header import Value, read_header
from headrace.text.pretokenize import pre_tokenizer

_CONTROL, _USER_DEFINED = 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """What a model's files say about its text.

    Attributes:
        tokenizer: Byte-level byte-pair tokenizer, special tokens and post-processor set.
        chat_template: Jinja2 source; None when the model has none.
        eos_token_ids: Tokens that end an answer, at least one.
        bos_token: Text of the begin-of-sequence token, empty when there is none.
        eos_token: Text of the end-of-sequence token.
    """

    tokenizer: Tokenizer
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    bos_token: str
    eos_token: str


def read_source(path: Path) -> TextSource:
    """Read a GGUF file, or a folder with tokenizer.json.

    Raises:
        ConfigError: the files are missing, damaged, or of a kind that is not supported.
    """
    return _from_folder(path) if path.is_dir() else _from_gguf(path)


def _from_gguf(path: Path) -> TextSource:
    header = read_header(path)
    kind = _text(header, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise ConfigError(
            f"tokenizer model is {kind!r}; only byte-level BPE ('gpt2') is supported", field="tokenizer.ggml.model"
        )
    pieces = _texts(header, "tokenizer.ggml.tokens")
    tokenizer = _build(header, pieces)
    eos = _integer(header, "tokenizer.ggml.eos_token_id")
    if eos is None or not 0 <= eos < len(pieces):
        raise ConfigError(
            f"end-of-sequence token is {eos}; wanted one of {len(pieces)} ids", field="tokenizer.ggml.eos_token_id"
        )
    turn_end = _integer(header, "tokenizer.ggml.eot_token_id")
    bos = _integer(header, "tokenizer.ggml.bos_token_id")
    template = header.get("tokenizer.chat_template")
    return TextSource(
        tokenizer=tokenizer,
        chat_template=template if isinstance(template, str) else None,
        eos_token_ids=(eos,) if turn_end in (None, eos) else (eos, int(turn_end or 0)),
        bos_token="" if bos is None else pieces[bos],
        eos_token=pieces[eos],
    )


def _build(header: Mapping[str, Value], pieces: list[str]) -> Tokenizer:
    cut = pre_tokenizer(_text(header, "tokenizer.ggml.pre"))
    merges = [_pair(merge) for merge in _texts(header, "tokenizer.ggml.merges")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut.ignore_merges))
    tokenizer.pre_tokenizer = cut.build()
    normalizer = cut.normalizer()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    kinds = header.get("tokenizer.ggml.token_type", [])
    if isinstance(kinds, list):
        _add_special(tokenizer, pieces, kinds)
    _add_frame(tokenizer, header, pieces)
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _add_special(tokenizer: Tokenizer, pieces: list[str], kinds: list[int | float | bool | str]) -> None:
    control = [AddedToken(piece, special=True) for piece, kind in zip(pieces, kinds, strict=False) if kind == _CONTROL]
    own = [
        AddedToken(piece, normalized=False) for piece, kind in zip(pieces, kinds, strict=False) if kind == _USER_DEFINED
    ]
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(own)


def _add_frame(tokenizer: Tokenizer, header: Mapping[str, Value], pieces: list[str]) -> None:
    """Put begin and end tokens around text encoded with `add_special`, where the model wants them."""
    bos = _integer(header, "tokenizer.ggml.bos_token_id") if header.get("tokenizer.ggml.add_bos_token") else None
    eos = _integer(header, "tokenizer.ggml.eos_token_id") if header.get("tokenizer.ggml.add_eos_token") else None
    tokens = [(pieces[index], index) for index in (bos, eos) if index is not None]
    if not tokens:
        return
    before = [pieces[bos]] if bos is not None else []
    after = [pieces[eos]] if eos is not None else []
    tokenizer.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=tokens)


def _from_folder(folder: Path) -> TextSource:
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    # The tokenizers library raises Exception itself, and nothing narrower, for a damaged file.
    except Exception as error:  # noqa: BLE001
        raise ConfigError(f"cannot read {path.name} in the model folder: {error}", field="model") from error
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise ConfigError(
            f"decoder is {type(tokenizer.decoder).__name__}; only byte-level tokenizers are supported",
            field="tokenizer.json",
        )
    config = _json(folder / "tokenizer_config.json")
    eos_token = _token_text(config.get("eos_token"))
    return TextSource(
        tokenizer=tokenizer,
        chat_template=_folder_template(folder, config),
        eos_token_ids=_folder_eos(folder, tokenizer, eos_token),
        bos_token=_token_text(config.get("bos_token")),
        eos_token=eos_token,
    )


def _folder_eos(folder: Path, tokenizer: Tokenizer, eos_token: str) -> tuple[int, ...]:
    """Return the generation config's end tokens first: chat models name several there."""
    for name in ("generation_config.json", "config.json"):
        found = _json(folder / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if found is not None and all(isinstance(index, int) for index in ids):
            return tuple(ids)
    index = tokenizer.token_to_id(eos_token)
    if index is None:
        raise ConfigError("no end-of-sequence token in the model folder", field="eos_token_id")
    return (index,)


def _folder_template(folder: Path, config: Mapping[str, object]) -> str | None:
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _token_text(found: object) -> str:
    if isinstance(found, dict):
        found = found.get("content")
    return found if isinstance(found, str) else ""


def _json(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path.name} is not JSON: {error}", field=path.name) from error
    return found if isinstance(found, dict) else {}


def _text(header: Mapping[str, Value], key: str) -> str:
    found = header.get(key)
    if not isinstance(found, str):
        raise ConfigError(f"{key} is {found!r}; wanted a text", field=key)
    return found


def _texts(header: Mapping[str, Value], key: str) -> list[str]:
    found = header.get(key)
    if not isinstance(found, list):
        raise ConfigError(f"{key} is missing; wanted a list of texts", field=key)
    return [str(item) for item in found]


def _integer(header: Mapping[str, Value], key: str) -> int | None:
    found = header.get(key)
    return found if isinstance(found, int) else None
