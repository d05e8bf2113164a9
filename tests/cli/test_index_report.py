import grpc
import pytest

from headrace.cli.index_report import IndexReport, describe_indexes
from headrace.v1 import index_pb2

HEALTHY = {"is_connected": True, "is_synced": True, "num_blocks": 10, "memory_bytes": 1280, "budget_bytes": 10**6}


def report(**answer) -> IndexReport:
    return IndexReport(process="router", index=index_pb2.DescribeIndexResponse(**HEALTHY | answer))


def test_a_copy_that_is_current_has_no_problem():
    healthy = report()
    assert healthy.problems == ()
    assert healthy.rows()[0].startswith("router: 10 blocks in 0.0 of 1 MB (128 bytes each)")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"is_connected": False, "problem": "refused"}, "the last state is served: refused"),
        ({"is_synced": False}, "has not caught up"),
        ({"locations": [index_pb2.IndexLocation(name="p0", is_resyncing=True)]}, "p0: an event was missed"),
        ({"drift": 0.5, "drift_alarm": 0.3}, "differ from what was promised by 50%"),
    ],
)
def test_what_somebody_should_look_at_is_said_first(answer, words):
    (problem,) = report(**answer).problems
    assert words in problem
    assert words in report(**answer).rows()[0]


def test_drift_below_the_alarm_is_shown_and_no_problem():
    drifting = report(predicted_tokens=100, actual_tokens=90, drift=0.1, drift_alarm=0.3)
    assert drifting.problems == ()
    assert drifting.rows()[-1] == "  hit tokens: 100 promised, 90 found, drift 10.0% (alarm at 30%)"


def test_a_location_cannot_write_to_the_terminal():
    rows = report(locations=[index_pb2.IndexLocation(name="p0\x1b[2J", epoch="e")]).rows()
    assert "\x1b" not in "".join(rows)


def test_a_process_that_is_away_is_said_to_be():
    with grpc.insecure_channel("127.0.0.1:1"):
        (away,) = describe_indexes({"kvstore": "127.0.0.1:1"}, timeout_s=2.0)
    assert away.rows() == [f"kvstore: does not answer: {away.error}"]
