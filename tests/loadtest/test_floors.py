"""The floors of loadtest/peers are the arithmetic of PERFORMANCE's section on them, and stay below what is possible."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS_BYTES = 96_400_000


@pytest.fixture
def floors(monkeypatch):
    for folder in ("loadtest/peers", "loadtest/ratios"):
        monkeypatch.syspath_prepend(ROOT / folder)
    return importlib.import_module("floors")


def rates(floors, *, read_bytes_s=1e30, flop_s=1e30):
    return floors.Rates(read_bytes_s=read_bytes_s, flop_s=flop_s)


def floor(floors, name, seed=1, **limits):
    workload = importlib.import_module("workloads").WORKLOADS[name]
    return floors.floor(workload, workload.asks(seed), rates(floors, **limits), WEIGHTS_BYTES)


def test_one_stream_reads_the_weights_once_a_token(floors):
    assert floor(floors, "W1", read_bytes_s=45e9) == pytest.approx(2.14e-3, rel=0.01)


def test_one_stream_is_bound_by_products_where_they_are_slower(floors):
    assert floor(floors, "W1", read_bytes_s=45e9, flop_s=100e9) == pytest.approx(2.69e-3, rel=0.01)


def test_a_long_prompt_costs_its_linears_and_half_a_square_of_attention(floors):
    linear, attention = 212.3e6 * 8000, 34_560 * 8000**2
    assert floor(floors, "W3:8000", flop_s=1e9) == pytest.approx((linear + attention + 57e6) / 1e9, rel=0.001)


def test_users_share_the_reads_of_a_step_but_not_the_products(floors):
    eight, many = (floor(floors, f"W2@{users}", read_bytes_s=1e9) for users in (8, 32))
    assert eight == pytest.approx(WEIGHTS_BYTES / 8 / 1e9)
    assert many == pytest.approx(WEIGHTS_BYTES / 32 / 1e9)


def test_an_output_token_pays_for_the_prompt_before_it(floors):
    ours = floor(floors, "W2@8", flop_s=1e9)
    workload = importlib.import_module("workloads").WORKLOADS["W2@8"]
    asks = workload.asks(1)
    tokens_in, tokens_out = sum(len(ask.prompt) for ask in asks), sum(ask.num_tokens for ask in asks)
    linear = (212.3e6 * (tokens_in + tokens_out) / tokens_out + 56.6e6) / 1e9
    assert linear < ours < 1.05 * linear


def test_a_shared_prefix_is_computed_once(floors):
    shared, apart = floor(floors, "W4:burst", flop_s=1e9), floor(floors, "W4:nothing-shared", flop_s=1e9)
    prompt, alone, out = 2112, 64, 15
    linear = 212.3e6 * (prompt + 15 * alone + 16 * out) + 56.6e6 * 256
    attention = 34_560 * ((prompt + out) ** 2 + 15 * ((prompt + out) ** 2 - 2048**2))
    assert shared == pytest.approx((linear + attention) / 1e9, rel=0.001)
    assert apart > 7 * shared


def test_the_rates_of_this_machine_are_within_what_processors_do(floors, monkeypatch):
    rates = importlib.import_module("rates")
    monkeypatch.setattr(rates, "READ_BYTES", 1 << 24)
    monkeypatch.setattr(rates, "MATRIX", 256)
    found = rates.measure()
    assert 1e8 < found.read_bytes_s < 1e13
    assert 1e8 < found.flop_s < 1e15
