"""More work than the bound is refused with a time to come back."""

import httpx
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

SHORT = {"prompt": "The mill", "max_tokens": 2, "temperature": 0}
LONG = {"prompt": "The river", "max_tokens": 100, "ignore_eos": True, "stream": True}


def test_more_requests_than_the_bound_get_503_with_a_time_to_retry(start_cluster):
    cluster = start_cluster("hybrid=1", "bf16", "router.max_live_requests=1")
    before = cluster.footprint()
    with httpx.Client(base_url=cluster.http, timeout=60.0, trust_env=False) as http:
        with http.stream("POST", "/v1/completions", json=LONG) as running:
            lines = running.iter_lines()
            next(lines)
            refused = http.post("/v1/completions", json=SHORT)
            assert any("[DONE]" in line for line in lines)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert http.post("/v1/completions", json=SHORT).status_code == 200
    cluster.assert_no_leaks(before)
