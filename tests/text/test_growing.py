"""Whatever way a text arrives, its tokens are those of the whole text."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from headrace.text.cuts import SafeCuts, cuts_of
from headrace.text.growing import SLICE_CHARS, SLICE_SLACK_TOKENS, GrowingTokens
from headrace.text.pretokenize import PRE_TOKENIZERS

WORDS = (
    "the don't we'll I'M they'RE '' 's 'll 12 3456 3.14 _x f(x): ** ... ?! \r\n \n \n\n \t  \u3000 \u00a0 ( ) "
    "naïve e\u0301 =\u0338 中文 字。 、日 한국 각 ᆨ 🙂 👩‍👩‍👧 <| "
    "<|im <|im_ end|> <|im_end|> <|im_start|> |> \x00 \u2028 ﬁ Ⅻ ½ a \u0300"
).split(" ")
PIECES = st.lists(st.sampled_from([*WORDS, " ", "  ", ""]) | st.text(max_size=3), max_size=30)
MARKERS = ["<|im_start|>", "<|im_end|>", "<a b>"]


class Bytes:
    """Only what `GrowingTokens` asks of a model."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def encode(self, text):
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def trained(row):
    """Return a tokenizer of one row of the table that merges wherever its words let it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = row.build()
    tokenizer.normalizer = row.normalizer()
    rng = random.Random(1)
    texts = ["".join(rng.choice([*WORDS, " "]) for _ in range(60)) for _ in range(300)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(MARKERS)
    return tokenizer


@pytest.fixture(scope="module", params=["gpt-2", "smollm", "llama-bpe", "qwen2"])
def model(request):
    tokenizer = trained(PRE_TOKENIZERS[request.param])
    return Bytes(tokenizer), cuts_of(tokenizer)


@settings(max_examples=150, deadline=None)
@given(PIECES)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(model, pieces):
    tokens, growing = model[0], GrowingTokens(*model)
    final = []
    for piece in pieces:
        growing.append(piece)
        assert growing.stable[: len(final)] == final
        final = list(growing.stable)
    assert growing.text == "".join(pieces)
    assert growing.complete() == tokens.encode("".join(pieces))
    assert growing.complete()[: len(final)] == final


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40), PIECES), max_size=6))
def test_a_text_that_is_replaced_has_the_tokens_of_its_last_state(model, script):
    tokens, growing = model[0], GrowingTokens(*model)
    for is_replaced, num_kept_chars, pieces in script:
        text = "".join(pieces)
        if is_replaced:
            before = list(growing.stable)
            num_kept = growing.replace(growing.text[:num_kept_chars] + text)
            assert growing.stable[:num_kept] == before[:num_kept]
        else:
            growing.append(text)
        assert growing.complete() == tokens.encode(growing.text)


def test_words_are_released_as_soon_as_the_next_one_begins(model):
    tokens, growing = model[0], GrowingTokens(*model)
    for word in ("Streams", " carry", " water", " to", " the", " wheel"):
        before = growing.text
        growing.append(word)
        assert growing.stable == tokens.encode(before)


def test_text_without_spaces_is_released_at_its_marks(model):
    growing = GrowingTokens(*model)
    growing.append("日本語のテキスト。次の文")
    assert growing.stable == model[0].encode("日本語のテキスト")


class Counting:
    """Counts the characters among which a cut is looked for."""

    margin = 20

    def __init__(self):
        self.num_looked_at = 0

    def last(self, text, after, end):
        self.num_looked_at += min(end, len(text)) - after
        return after


def test_a_long_text_without_any_cut_is_looked_at_once(model):
    counting = Counting()
    growing = GrowingTokens(model[0], counting)
    for _ in range(200):
        growing.append("x" * 1000)
    assert growing.stable == []
    assert counting.num_looked_at < 1.1 * 200_000


def test_a_long_text_that_only_grows_is_looked_at_once_also_as_a_whole(model):
    counting, text = Counting(), ""
    growing = GrowingTokens(model[0], counting)
    for _ in range(50):
        text += "a" * 100
        growing.replace(text)
    assert counting.num_looked_at < 2 * len(text)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30_000), st.integers(0, 9_000), st.sampled_from("abc7")), max_size=5),
    st.integers(-40, 40),
)
def test_a_text_is_counted_to_a_few_tokens_per_slice_and_exactly_at_the_limit(model, script, distance):
    tokens, growing = model[0], GrowingTokens(*model)
    for num_kept, length, letter in script:
        growing.replace(growing.text[:num_kept] + letter * length)
        exact = len(tokens.encode(growing.text))
        slack = SLICE_SLACK_TOKENS * (len(growing.text) // SLICE_CHARS)
        assert abs(growing.num_tokens(10**9) - exact) <= slack
        assert (growing.num_tokens(exact + distance) > exact + distance) == (exact > exact + distance)


def test_a_new_text_keeps_what_both_begin_with(model):
    growing = GrowingTokens(*model)
    growing.append("one two three " * 400)
    num_stable = len(growing.stable)
    kept = growing.replace("one two three " * 200 + "four " * 200)
    assert 0.4 * num_stable < kept <= 0.5 * num_stable
    assert growing.replace("") == 0
    assert growing.complete() == []


def test_the_real_model_is_cut_at_its_words(smollm2):
    growing = GrowingTokens(smollm2, smollm2.cuts())
    text = "You are here.<|im_end|>\n<|im_start|>user\nWhat's 1234 + 5?  And\n\n  then?<|im_end|>"
    num_stable = []
    for character in text:
        growing.append(character)
        num_stable.append(len(growing.stable))
    assert len(set(num_stable)) >= 12
    assert growing.complete() == smollm2.encode(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Lowercase()),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("<mask>", rstrip=True)]),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("<word>", single_word=True)]),
    ],
    ids=["normalizer", "strips", "single_word"],
)
def test_a_tokenizer_that_looks_further_than_its_words_is_not_cut(change):
    tokenizer = trained(PRE_TOKENIZERS["gpt-2"])
    change(tokenizer)
    growing = GrowingTokens(Bytes(tokenizer), cuts_of(tokenizer))
    growing.append("one two three")
    assert growing.stable == []
    assert growing.complete() == tokenizer.encode("one two three").ids


def test_a_pattern_that_joins_words_has_no_cut_between_them():
    together = SafeCuts(lambda text: {0}, ())
    assert together.last("one two. three", 0, 99) == 0
