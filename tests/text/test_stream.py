import time

from hypothesis import given
from hypothesis import strategies as st

# SmolLM2's vocabulary lacks some bytes: of control characters, and of characters from U+40000 on.
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x3FFFF), max_size=60)
HARD = ["👩‍👩‍👧‍👦 family", "中文字符", "naïve café", "\U0001f1e9\U0001f1ea", "e\u0301", "a\ufeffb", "\x00\x7f"]


def streamed(model, ids, *, skip_special=True):
    stream = model.detokenizer(skip_special=skip_special)
    pieces = [stream.push(token_id) for token_id in ids]
    return pieces, stream.flush()


@given(text=st.one_of(TEXTS, st.sampled_from(HARD)))
def test_pieces_of_real_text_join_to_the_text_and_are_never_half_a_character(smollm2, text):
    pieces, rest = streamed(smollm2, smollm2.encode(text))
    assert rest == ""
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(data=st.data())
def test_pieces_of_random_tokens_join_to_what_decoding_at_once_gives(smollm2, data):
    ids = data.draw(st.lists(st.integers(0, smollm2.vocab_size - 1), max_size=30))
    pieces, rest = streamed(smollm2, ids)
    assert "".join(pieces) + rest == smollm2.decode(ids)


@given(raw=st.binary(max_size=40), skip_special=st.booleans(), data=st.data())
def test_invalid_bytes_and_special_tokens_give_the_same_text_as_decoding_at_once(byte_model, raw, skip_special, data):
    byte_ids = {byte_model.token_bytes(index): index for index in range(3, byte_model.vocab_size)}
    ids = [byte_ids[bytes([byte])] for byte in raw]
    ids.insert(data.draw(st.integers(0, len(ids))), 2)
    pieces, rest = streamed(byte_model, ids, skip_special=skip_special)
    assert "".join(pieces) + rest == byte_model.decode(ids, skip_special=skip_special)


def test_a_character_waits_for_its_last_byte(byte_model):
    ids = byte_model.encode("é🙂")
    assert streamed(byte_model, ids) == (["", "é", "", "", "", "🙂"], "")


def test_an_unfinished_character_comes_out_as_a_replacement_at_the_end(byte_model):
    assert streamed(byte_model, byte_model.encode("🙂")[:3]) == (["", "", ""], "\ufffd")


def test_a_push_late_in_an_answer_costs_what_an_early_one_costs(smollm2):
    ids = smollm2.encode("the quick brown fox 🙂 ") * 20
    stream = smollm2.detokenizer()
    best = []
    for _ in range(20):
        start = time.perf_counter()
        for token_id in ids:
            stream.push(token_id)
        best.append(time.perf_counter() - start)
    assert min(best[10:]) < 3 * min(best[:10])
