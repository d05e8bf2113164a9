"""A tokenizer small enough to be made inside a test."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from headrace.text.model import TextModel

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_byte_tokenizer(folder: Path, *, chat_template: str = _TEMPLATE) -> Path:
    """Write a Hugging Face folder whose tokens are the 256 bytes and three special tokens.

    Token ids 0 to 2 are special, 2 ends an answer, and byte b is token 3 + its place in the
    byte-level alphabet.

    Returns:
        The folder.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*_SPECIAL, *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in _SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    config = {"bos_token": _SPECIAL[0], "eos_token": _SPECIAL[2], "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def byte_text_model(folder: Path) -> TextModel:
    """Return the model of `write_byte_tokenizer`, written into `folder`."""
    return TextModel.load(write_byte_tokenizer(folder))
