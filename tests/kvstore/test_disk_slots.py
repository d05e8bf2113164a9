"""Which slots a write may take."""

from headrace.kvstore.disk_slots import RETRY_S, FreeSlots


def test_a_slot_that_was_written_before_is_taken_first():
    slots = FreeSlots()
    slots.give_unproven((0, 1))
    slots.give(7)
    assert [slots.take(0.0) for _ in range(4)] == [7, 0, 1, None]


def test_after_a_refusal_only_slots_that_were_written_are_free_for_a_while():
    slots = FreeSlots()
    slots.give_unproven((0, 1))
    slots.give(7)
    refused = slots.take(0.0)
    assert refused == 7
    slots.refuse(refused, 10.0)
    slots.give(8)
    assert slots.num_free(11.0) == 1
    assert [slots.take(11.0), slots.take(11.0)] == [8, None]
    assert slots.num_free(10.0 + RETRY_S) == 3
    assert [slots.take(10.0 + RETRY_S) for _ in range(3)] == [0, 1, 7]
