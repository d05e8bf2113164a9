"""Long texts are worked on beside the event loop, short ones on it."""

import threading

import pytest

from headrace.runtime.off_loop import INLINE_CHARS, off_loop


@pytest.mark.parametrize(("num_chars", "is_inline"), [(0, True), (INLINE_CHARS, True), (INLINE_CHARS + 1, False)])
async def test_only_long_texts_are_worked_on_in_another_thread(num_chars, is_inline):
    worker = await off_loop(num_chars, threading.current_thread)
    assert (worker is threading.current_thread()) == is_inline


async def test_the_caller_may_say_what_is_long():
    assert await off_loop(2, threading.current_thread, inline_chars=1) is not threading.current_thread()


@pytest.mark.parametrize("num_chars", [0, INLINE_CHARS + 1])
async def test_an_error_of_the_work_is_the_callers(num_chars):
    def fail():
        raise KeyError("no such thing")

    with pytest.raises(KeyError, match="no such thing"):
        await off_loop(num_chars, fail)
