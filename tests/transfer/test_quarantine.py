"""Which own blocks a transport may still touch."""

from headrace.transfer.quarantine import Quarantine


def test_a_waiter_is_called_when_the_last_of_its_transfers_left():
    quarantine, called = Quarantine(), []
    first, second = quarantine.enter([1, 2]), quarantine.enter([2, 3])
    quarantine.when_settled([2], lambda: called.append("both"))
    quarantine.when_settled([3], lambda: called.append("second"))
    quarantine.leave(second)
    assert called == ["second"]
    quarantine.leave(first)
    assert called == ["second", "both"]
    assert quarantine.num_unsettled == 0


def test_blocks_nobody_touches_are_settled_at_once():
    quarantine, called = Quarantine(), []
    quarantine.enter([1])
    quarantine.when_settled([2], lambda: called.append("now"))
    assert called == ["now"]


def test_transfers_begun_later_are_not_waited_for():
    quarantine, called = Quarantine(), []
    first = quarantine.enter([1])
    quarantine.when_settled([1], lambda: called.append("done"))
    quarantine.enter([1])
    quarantine.leave(first)
    quarantine.leave(first)
    assert called == ["done"]
