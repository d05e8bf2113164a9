"""The conversation trace: the reader of the published format, and the generator of its shape."""

import importlib
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def mooncake():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(Path("loadtest/traces").absolute()), *sys.path])
        return importlib.import_module("mooncake")


@pytest.fixture(scope="module")
def requests(mooncake):
    return mooncake.generate(1)


def test_the_same_seed_gives_the_same_trace(mooncake):
    assert mooncake.generate(3, 200) == mooncake.generate(3, 200)
    assert mooncake.generate(3, 200) != mooncake.generate(4, 200)


def test_a_generated_trace_has_the_published_figures(mooncake, requests):
    figures = mooncake.figures(requests)
    assert figures["requests"] == 12_031
    assert figures["span_s"] == pytest.approx(3_537, rel=0.01)
    assert figures["input_tokens"] == pytest.approx(12_035, rel=0.06)
    assert figures["output_tokens"] == pytest.approx(343, rel=0.05)
    assert figures["reused"] == pytest.approx(0.37, abs=0.04)
    assert figures["reuse_one_block_at_most"] == pytest.approx(0.61, abs=0.05)


def test_requests_come_in_order_and_name_all_their_blocks(requests):
    assert all(one.at_s <= other.at_s for one, other in zip(requests, requests[1:], strict=False))
    assert all(len(request.hash_ids) == -(-request.input_tokens // 512) for request in requests)


def test_a_block_stands_behind_the_same_one_in_every_prompt(requests):
    before = {}
    for request in requests:
        for one, other in zip(request.hash_ids, request.hash_ids[1:], strict=False):
            assert before.setdefault(other, one) == one


def test_the_reader_takes_the_published_format(mooncake, tmp_path):
    line = {"timestamp": 1500, "input_length": 1030, "output_length": 7, "hash_ids": [0, 5, 9]}
    (tmp_path / "trace.jsonl").write_text(json.dumps(line) + "\n")
    (request,) = mooncake.read(tmp_path / "trace.jsonl")
    assert (request.at_s, request.input_tokens, request.output_tokens) == (1.5, 1030, 7)
    assert request.full_ids == (0, 5)


@pytest.mark.parametrize(
    "line", ['{"timestamp": 1}', '{"timestamp":1,"input_length":9,"output_length":1,"hash_ids":[]}']
)
def test_the_reader_refuses_another_format(mooncake, tmp_path, line):
    (tmp_path / "trace.jsonl").write_text(line)
    with pytest.raises(ValueError, match="Mooncake"):
        mooncake.read(tmp_path / "trace.jsonl")


def test_a_conversation_is_kept_with_all_its_turns_or_left_out(mooncake, requests):
    kept = mooncake.conversations(requests, 0.3, 1)
    assert 0.2 < len(kept) / len(requests) < 0.4
    kept_set = set(kept)
    names = {request.hash_ids[1] for request in kept if len(request.hash_ids) > 1}
    left = {request.hash_ids[1] for request in requests if len(request.hash_ids) > 1 and request not in kept_set}
    assert not names & left
