"""A log line is one JSON object."""

import io
import json
import logging
from pathlib import Path

import pytest

from headrace.runtime.logs import JsonFormatter, setup_logs


@pytest.fixture
def lines():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter({"role": "decode"}))
    logger = logging.getLogger("headrace.test_logs")
    logger.addHandler(handler)
    logger.propagate = False
    yield logger, lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.propagate = True


def test_fields_stand_beside_a_constant_text(lines):
    logger, read = lines
    logger.warning("peer lost", extra={"peer": "prefill-0", "num_left": 2})
    [line] = read()
    assert line["event"] == "peer lost"
    assert (line["peer"], line["num_left"], line["role"], line["level"]) == ("prefill-0", 2, "decode", "warning")
    assert line["time"].endswith("Z")


def test_values_of_any_kind_stay_one_line(lines):
    logger, read = lines
    logger.warning("odd", extra={"path": Path("a\nb"), "raw": b"\n"})
    assert read()[0]["path"] == "a\nb"


def test_a_traceback_is_a_field(lines):
    logger, read = lines
    try:
        raise ValueError("inside")
    except ValueError:
        logger.exception("failed")
    [line] = read()
    assert "ValueError: inside" in line["traceback"]


def test_setting_up_replaces_what_was_there():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    first, second = io.StringIO(), io.StringIO()
    try:
        setup_logs(first, "INFO")
        setup_logs(second, "WARNING", worker="w")
        root.info("quiet")
        root.warning("loud")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    assert first.getvalue() == ""
    assert json.loads(second.getvalue())["worker"] == "w"
