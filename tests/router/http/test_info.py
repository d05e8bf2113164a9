async def test_models_are_listed_and_shown(http):
    card = {"id": "tiny", "object": "model", "created": 1000, "owned_by": "headrace", "max_model_len": 200}
    assert (await http.get("/v1/models")).json() == {"object": "list", "data": [card]}
    assert (await http.get("/v1/models/tiny")).json() == card
    assert (await http.get("/v1/models/some/other")).status_code == 404


async def test_liveness_says_nothing_of_the_cluster_and_readiness_gives_the_reason(http, frontend):
    assert (await http.get("/ready")).status_code == 200
    frontend.reason = "no decode worker"
    assert (await http.get("/health")).status_code == 200
    response = await http.get("/ready")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "no decode worker"


async def test_metrics_and_version_are_served(http):
    response = await http.get("/metrics")
    assert response.text == "headrace_up 1\n"
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert (await http.get("/version")).json()["version"]
