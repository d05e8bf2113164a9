"""How models cut text before byte-pair merging: one table row per GGUF name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Regex, normalizers, pre_tokenizers

from headrace.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """The cut of one model family.

    Attributes:
        build: Makes the pre-tokenizer.
        is_nfc: Whether text is brought to Unicode form C first.
        ignore_merges: Whether a word found whole in the vocabulary skips the merges.
    """

    build: Callable[[], pre_tokenizers.PreTokenizer]
    is_nfc: bool = False
    ignore_merges: bool = False

    def normalizer(self) -> normalizers.Normalizer | None:
        """Return the normalizer to set, if any."""
        return normalizers.NFC() if self.is_nfc else None


def _regex(digits: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """Return a builder of the split that Llama 3 and Qwen share but for their digits."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def build() -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return build


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


_GPT2 = PreTokenizer(build=_words)
_SMOLLM = PreTokenizer(build=_single_digits)
_LLAMA3 = PreTokenizer(build=_regex(r"\p{N}{1,3}"), ignore_merges=True)
_QWEN2 = PreTokenizer(build=_regex(r"\p{N}"), is_nfc=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "gpt-2": _GPT2,
        "gpt2": _GPT2,
        "smollm": _SMOLLM,
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "qwen2": _QWEN2,
    }
)
"""Values of `tokenizer.ggml.pre` that are understood."""


def pre_tokenizer(name: str) -> PreTokenizer:
    """Return the row of a GGUF `tokenizer.ggml.pre` value.

    Raises:
        ConfigError: the value is not in the table.
    """
    found = PRE_TOKENIZERS.get(name)
    if found is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ConfigError(f"pre-tokenizer {name!r} is not supported; known are {known}", field="tokenizer.ggml.pre")
    return found
