"""A measurement in a file: read where it was made and nowhere else."""

import json
import logging
import os

import pytest

from headrace.engine.kept_file import KeptFile, processor

INSTANCE = {"processor": "Fast, 2 cores", "threads": 2}
MEASURED = {"rows": [1, 2], "seconds": [0.25, 1e-7]}


def test_a_measurement_is_read_as_it_was_written_and_leaves_nothing_else(tmp_path):
    kept = KeptFile(tmp_path / "new", "rows", INSTANCE)
    assert kept.read() is None
    kept.write({"rows": []})
    kept.write(MEASURED)
    assert KeptFile(tmp_path / "new", "rows", INSTANCE).read() == MEASURED
    assert list((tmp_path / "new").iterdir()) == [kept.path]


def test_kinds_and_instances_have_a_file_each_even_if_one_takes_the_place_of_another(tmp_path):
    kept = KeptFile(tmp_path, "rows", INSTANCE)
    kept.write(MEASURED)
    for other in (KeptFile(tmp_path, "cost", INSTANCE), KeptFile(tmp_path, "rows", INSTANCE | {"threads": 3})):
        assert other.read() is None
        other.path.write_bytes(kept.path.read_bytes())
        assert other.read() is None
    assert kept.read() == MEASURED


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe", json.dumps({"instance": INSTANCE}).encode()]
)
def test_a_torn_file_counts_for_nothing(tmp_path, content):
    kept = KeptFile(tmp_path, "rows", INSTANCE)
    kept.path.write_bytes(content)
    assert kept.read() is None


def test_what_is_no_file_is_not_waited_for(tmp_path):
    kept = KeptFile(tmp_path, "rows", INSTANCE)
    os.mkfifo(kept.path)
    assert kept.read() is None


def test_a_folder_that_cannot_be_written_costs_a_warning_alone(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        KeptFile(tmp_path / "file" / "folder", "rows", INSTANCE).write(MEASURED)
    assert "measurement not kept" in caplog.text


def test_the_processor_is_named_with_its_cores():
    assert processor().endswith(" cores")
