"""Whatever arrives at the front door, the answer is a typed error and the service lives on."""

import json

import httpx
import pytest

from headrace.testing.cluster import LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

GOOD = {"prompt": "The mill", "max_tokens": 2, "temperature": 0}


@pytest.fixture
def http(cluster: LocalCluster):
    with httpx.Client(base_url=cluster.http, timeout=60.0, trust_env=False) as http:
        yield http


@pytest.fixture(autouse=True)
def lives_on(cluster: LocalCluster, http: httpx.Client):
    before = cluster.footprint()
    yield
    assert http.post("/v1/completions", json=GOOD).status_code == 200
    cluster.assert_no_leaks(before)


def body_of(**changes: object) -> bytes:
    return json.dumps(GOOD | changes).encode()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", None),
        (b"{", None),
        (b'{"prompt": "\xff\xfe", "max_tokens": 1}', None),
        (b'{"prompt": "a", "temperature": NaN}', None),
        (b"[" * 100_000, None),
        (body_of(prompt=""), "prompt"),
        (body_of(prompt=[]), "prompt"),
        (body_of(prompt=[-1]), "prompt"),
        (body_of(prompt=[49152]), "prompt"),
        (body_of(prompt={"a": 1}), "prompt"),
        (body_of(prompt="a " * 9000), "prompt"),
        (body_of(temperature=-0.1), "temperature"),
        (body_of(temperature="1"), "temperature"),
        (body_of(top_k=-2), "top_k"),
        (body_of(min_p=1.5), "min_p"),
        (body_of(repetition_penalty=0), "repetition_penalty"),
        (body_of(max_tokens=-5), "max_tokens"),
        (body_of(max_tokens=9000), "max_tokens"),
        (body_of(stop=[""]), "stop"),
        (body_of(stop=["a"] * 100), "stop"),
        (body_of(n=100), "n"),
        (body_of(logprobs=21), "logprobs"),
        (body_of(timeout=0), "timeout"),
        (body_of(model=7), "model"),
    ],
)
def test_a_bad_body_gets_400_that_names_the_field(http, body, field):
    answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error["message"]
    if field is not None:
        assert field in (error["param"] or "") or field in error["message"]


def test_a_huge_body_is_refused_without_being_kept(http):
    def pieces():
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"x" * (1 << 20)
        yield b'"}'

    answer = http.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["message"]


def test_an_unknown_model_gets_404(http):
    answer = http.post("/v1/completions", json=GOOD | {"model": "other"})
    assert answer.status_code == 404
    assert "other" in answer.json()["error"]["message"]


def test_a_deadline_gets_504(http):
    answer = http.post("/v1/completions", json={"prompt": list(range(100, 2100)), "max_tokens": 500, "timeout": 0.3})
    assert answer.status_code == 504
