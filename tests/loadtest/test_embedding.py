"""Vectors of texts: near when texts share rare words."""

import numpy as np
import pytest

TEXTS = ["the water wheel turns", "the mill grinds corn", "the river floods the fields", "the wheel of the mill"]


@pytest.fixture(scope="module")
def words(traces):
    return traces("embedding").HashedWords(TEXTS)


def test_vectors_have_length_one(words):
    vectors = words.embed(TEXTS)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0)


def test_a_text_without_words_has_no_direction(words):
    assert not words.embed(["", "?!"]).any()


def test_no_texts_have_no_vectors(words):
    assert words.embed([]).shape == (0, 512)


def test_a_text_is_nearest_to_one_that_shares_a_rare_word(words):
    near = words.embed(TEXTS) @ words.embed(["The RIVER, rising"])[0]
    assert int(near.argmax()) == 2


def test_the_same_text_has_the_same_vector(traces, words):
    assert (traces("embedding").HashedWords(TEXTS).embed(TEXTS) == words.embed(TEXTS)).all()
