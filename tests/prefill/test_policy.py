"""Which blocks go when: each that the receiver lacks, once, and only when it is complete."""

from hypothesis import given
from hypothesis import strategies as st

from headrace.core.block import blocks_for
from headrace.prefill.policy import PushRange, next_push

SIZES = st.sampled_from([1, 4, 16, 32])


@st.composite
def prompts(draw):
    """A prompt, the blocks at the receiver, and the tokens present after each chunk."""
    block_tokens = draw(SIZES)
    num_tokens = draw(st.integers(1, 300))
    at_receiver = draw(st.integers(0, (num_tokens - 1) // block_tokens))
    stops = draw(st.sets(st.integers(0, num_tokens - 1), max_size=12))
    return block_tokens, num_tokens, at_receiver, [*sorted(stops), num_tokens]


@given(prompts())
def test_pushes_are_exactly_the_blocks_that_the_receiver_lacks_each_once_in_order(prompt):
    block_tokens, num_tokens, at_receiver, stops = prompt
    done, pushed = at_receiver, []
    for stop in stops:
        push = next_push(done, stop, block_tokens, is_last=stop == num_tokens)
        if push is not None:
            pushed.extend(range(push.start, push.end))
            done = push.end
    assert pushed == list(range(at_receiver, blocks_for(num_tokens, block_tokens)))


@given(prompts())
def test_before_the_prompt_is_complete_only_full_blocks_go(prompt):
    block_tokens, num_tokens, at_receiver, stops = prompt
    done = at_receiver
    for stop in stops[:-1]:
        push = next_push(done, stop, block_tokens, is_last=False)
        if push is not None:
            assert push.start == done < push.end
            assert push.end * block_tokens <= stop
            done = push.end


def test_a_partly_filled_last_block_goes_at_the_end():
    assert next_push(1, 10, 4, is_last=False) == PushRange(start=1, end=2)
    assert next_push(2, 10, 4, is_last=True) == PushRange(start=2, end=3)


def test_nothing_goes_while_no_further_block_is_complete():
    assert next_push(2, 11, 4, is_last=False) is None
    assert next_push(5, 8, 4, is_last=False) is None
