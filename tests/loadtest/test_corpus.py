"""Text for traces: passages, excerpts and sentences of Python's reference."""

import pytest
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def corpus(traces):
    return traces("corpus")


@pytest.fixture(scope="module")
def english(corpus):
    return corpus.english()


@pytest.fixture(scope="module")
def contexts(traces):
    return traces("contexts")


def test_there_are_hundreds_of_kilobytes(english):
    assert sum(map(len, english.paragraphs)) > 250_000


def test_long_paragraphs_are_there_once(english):
    long = [paragraph for paragraph in english.paragraphs if len(paragraph) >= 60]
    assert len(set(long)) == len(long)
    assert max(map(len, long)) <= 2_000


def test_the_text_is_the_same_each_time(corpus, english):
    assert corpus.english() == english


@pytest.mark.parametrize("characters", [1, 400, 10_000, 10**9])
def test_passages_are_the_whole_text_and_long_enough(english, characters):
    passages = english.passages(characters)
    assert "\n\n".join(passages) == "\n\n".join(english.paragraphs)
    assert all(len(passage) + 2 >= characters for passage in passages[:-1])


@given(first=st.integers(0, 10**6), characters=st.integers(0, 50_000))
def test_an_excerpt_is_as_near_to_its_length_as_paragraphs_allow(corpus, english, first, characters):
    excerpt = english.excerpt(first, characters)
    start = english.paragraphs[first % len(english.paragraphs)]
    assert excerpt.startswith(start)
    assert abs(len(excerpt) - characters) <= 1_001 or excerpt == start


def test_an_excerpt_goes_on_at_the_first_paragraph(corpus):
    assert corpus.Corpus(("one", "two", "three")).excerpt(2, 15) == "three\n\none\n\ntwo"


def test_sentences_are_neither_short_nor_long(english):
    sentences = english.sentences()
    assert len(sentences) > 500
    assert all(60 <= len(sentence) <= 240 and sentence.endswith((".", "!", "?")) for sentence in sentences)
    assert not any("\n" in sentence for sentence in sentences)


def test_a_document_of_known_length_has_the_same_text_everywhere(corpus, english, contexts):
    def update(context, *segments):
        return contexts.Update(at_s=0, context=context, segments=tuple(contexts.Segment(*one) for one in segments))

    tokens = contexts.Tokens(1_000)
    first, second = corpus.filled([update("a", ("7", tokens), ("8", "kept")), update("b", ("7", tokens))], english)
    assert first.segments[0] == second.segments[0]
    assert first.segments[1].text == "kept"
    assert len(first.segments[0].text) == pytest.approx(4_100, abs=1_001)


def test_appended_texts_of_known_length_differ(corpus, english, contexts):
    appends = [contexts.Append(at_s=0, context="a", text=contexts.Tokens(number)) for number in (200, 200, 0)]
    one, other, nothing = (event.text for event in corpus.filled(appends, english))
    assert one != other
    assert nothing == ""
