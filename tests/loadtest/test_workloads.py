"""The requests that servers are compared with."""

import importlib
import itertools
import sys
from pathlib import Path

import pytest


@pytest.fixture
def workloads(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path("loadtest/peers").absolute()), *sys.path])
    return importlib.import_module("workloads").WORKLOADS


def test_no_workload_finds_a_prefix_of_another_one_or_of_another_seed_in_a_cache(workloads):
    begins = {
        (name, seed): {tuple(ask.prompt[:16]) for ask in workload.asks(seed)}
        for name, workload in workloads.items()
        for seed in (0, 1, 2)
    }
    for one, other in itertools.combinations(begins.values(), 2):
        assert not one & other


def test_the_same_seed_gives_every_server_the_same_requests(workloads):
    for workload in workloads.values():
        assert workload.asks(3) == workload.asks(3)
