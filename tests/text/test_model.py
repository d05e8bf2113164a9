import json
import struct
import time

import pytest

from headrace.errors import ConfigError, InvalidRequest
from headrace.testing.text import write_byte_tokenizer
from headrace.text.model import TextModel
from headrace.text.pretokenize import PRE_TOKENIZERS

HARD = [
    "Hello world",
    "  leading, trailing  \n\n\ttabs ",
    "don't we'll I'M they'RE",
    "1234567890 3.14159 0x1F",
    "def f(x):\n    return x ** 2  # comment\r\n",
    "naïve café e\u0301 ﬁ \u212b",
    "中文字符 日本語テキスト 한국어",
    "🙂👩‍👩‍👧‍👦🇩🇪",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|>x",
    "\x00\x01\u200b\ufeff\u2028",
    "a" * 300,
    "",
]


def test_the_real_model_has_its_vocabulary_and_end_token(smollm2):
    assert smollm2.vocab_size == 49152
    assert smollm2.eos_token_ids == (2,)
    assert smollm2.token_bytes(2) == b"<|im_end|>"
    assert smollm2.token_bytes(10**9) == b""


@pytest.mark.slow
def test_ids_equal_those_of_transformers(smollm2, smollm2_path, monkeypatch):
    """Only ASCII digits are compared: transformers 5.23 ignores `tokenizer.ggml.pre` of a GGUF file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    reference = transformers.AutoTokenizer.from_pretrained(str(smollm2_path.parent), gguf_file=smollm2_path.name)
    for text in HARD:
        assert smollm2.encode(text) == reference(text).input_ids, text


@pytest.mark.parametrize("text", HARD)
def test_decoding_gives_the_text_back(smollm2, text):
    assert smollm2.decode(smollm2.encode(text), skip_special=False) == text


def test_special_tokens_are_left_out_of_text_unless_asked_for(smollm2):
    ids = smollm2.encode("a<|im_end|>b")
    assert smollm2.decode(ids) == "ab"
    assert smollm2.decode(ids, skip_special=False) == "a<|im_end|>b"


def test_a_chat_is_rendered_and_its_markers_are_single_tokens(smollm2):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    expected = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert smollm2.render_chat(messages) == expected
    assert smollm2.chat_tokens(messages).count(1) == 3


def test_the_real_model_loads_in_less_than_a_second(smollm2_path):
    start = time.process_time()
    TextModel.load(smollm2_path)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("text", HARD)
def test_the_least_number_of_tokens_is_not_above_the_real_one(smollm2, text):
    assert smollm2.min_num_tokens(text) <= len(smollm2.encode(text))


def gguf(path, **values):
    """Write a header with string, integer and list-of-string values."""
    body = b"GGUF" + struct.pack("<IQQ", 3, 0, len(values))
    for key, value in values.items():
        name = ("tokenizer." + key.replace("__", ".")).encode()
        body += struct.pack("<Q", len(name)) + name + encoded(value)
    path.write_bytes(body)
    return path


def encoded(value):
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case str():
            return struct.pack("<IQ", 8, len(value.encode())) + value.encode()
        case [int(), *_]:
            return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    items = b"".join(struct.pack("<Q", len(item.encode())) + item.encode() for item in value)
    return struct.pack("<IIQ", 9, 8, len(value)) + items


def small_gguf(path, **changes):
    values = {
        "ggml__model": "gpt2",
        "ggml__pre": "llama-bpe",
        "ggml__tokens": ["<s>", "</s>", "a", "b", "ab", "<tool>"],
        "ggml__token_type": [3, 3, 1, 1, 1, 4],
        "ggml__merges": ["a b"],
        "ggml__bos_token_id": 0,
        "ggml__eos_token_id": 1,
        "ggml__add_bos_token": True,
    }
    return gguf(path, **{key: value for key, value in {**values, **changes}.items() if value is not None})


def test_begin_tokens_are_added_only_on_request(tmp_path):
    model = TextModel.load(small_gguf(tmp_path / "m.gguf"))
    assert model.encode("ab") == [4]
    assert model.encode("ab", add_special=True) == [0, 4]
    assert model.encode("a<tool></s>") == [2, 5, 1]
    assert model.decode([2, 5, 1]) == "a<tool>"


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_known_pre_tokenizer_loads(tmp_path, name):
    assert TextModel.load(small_gguf(tmp_path / "m.gguf", ggml__pre=name)).encode("ab") == [4]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "a 12", ["a", "Ġ", "1", "2"]),
        ("smollm", "²½", ["Â²", "Â½"]),
        ("gpt-2", "a 12", ["a", "Ġ12"]),
        ("llama-bpe", "a 1234", ["a", "Ġ", "123", "4"]),
        ("qwen2", "a 12", ["a", "Ġ", "1", "2"]),
    ],
)
def test_pre_tokenizers_cut_numbers_as_their_models_do(pre, text, words):
    assert [word for word, _ in PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)] == words


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ggml__pre": "unheard-of"}, "tokenizer.ggml.pre"),
        ({"ggml__model": "llama"}, "tokenizer.ggml.model"),
        ({"ggml__tokens": None}, "tokenizer.ggml.tokens"),
        ({"ggml__eos_token_id": 99}, "tokenizer.ggml.eos_token_id"),
    ],
)
def test_a_gguf_that_is_not_understood_refuses_to_load(tmp_path, changes, field):
    with pytest.raises(ConfigError) as caught:
        TextModel.load(small_gguf(tmp_path / "m.gguf", **changes))
    assert caught.value.field == field


def test_a_gguf_cut_at_any_byte_refuses_to_load(tmp_path):
    whole = small_gguf(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError):
            TextModel.load(path)


def test_a_missing_path_refuses_to_load(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        TextModel.load(tmp_path / "none")


def test_a_model_without_a_template_refuses_chats(tmp_path):
    with pytest.raises(InvalidRequest, match="no chat template"):
        TextModel.load(small_gguf(tmp_path / "m.gguf")).render_chat([{"role": "user", "content": "a"}])


def test_a_folder_with_its_own_template_file_and_several_end_tokens_loads(tmp_path):
    folder = write_byte_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    model = TextModel.load(folder)
    assert model.eos_token_ids == (2, 0)
    assert model.render_chat([{"role": "user", "content": "x"}]) == "x<|im_end|>"
    assert model.decode(model.encode("héllo")) == "héllo"


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_a_damaged_folder_refuses_to_load(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError):
        TextModel.load(tmp_path)
