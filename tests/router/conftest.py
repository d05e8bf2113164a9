"""Clusters in this process, quick to notice what happened."""

import pytest

from headrace.worker.config import WorkerRole

ROLES = {"p": WorkerRole.PREFILL, "d": WorkerRole.DECODE, "h": WorkerRole.HYBRID}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("headrace.router.workers.REPORT_INTERVAL_MS", 10)
    monkeypatch.setattr("headrace.router.workers.RECONNECT_S", 0.02)
    monkeypatch.setattr("headrace.router.sequence.MOVE_PAUSE_S", 0.05)
    monkeypatch.setattr("headrace.router.actor.CANARY_RETRY_S", 0.005)
    monkeypatch.setattr("headrace.router.actor.LOOK_S", 0.005)
    monkeypatch.setattr("headrace.decode.reservations.EXPIRE_INTERVAL_S", 0.02)
    monkeypatch.setattr("headrace.decode.reservations.LANDING_S", 0.05)


@pytest.fixture
def roles():
    """Return workers by their names: p0 computes prompts, d0 generates, h0 does both."""
    return lambda names: {name: ROLES[name[0]] for name in names.split()}


@pytest.fixture
def prompt_of():
    """Return a prompt; different seeds share no prefix."""
    return lambda seed, length: tuple(3 + (seed * 7919 + index * (seed + 13)) % 250 for index in range(length))
