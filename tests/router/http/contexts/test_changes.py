"""Changes of a context over HTTP: what each shows, that each is made once, and when a context is gone."""

import asyncio

import pytest

from headrace.clock import VirtualClock

PATIENCE_S = 10.0


# -- How far a context is ---------------------------------------------------------


async def test_a_new_context_tells_what_it_is(api, http, ingestor):
    response = await http.post(api.url, json={"prefix": "ab", "mode": "update"})
    value = response.json()
    [session] = ingestor.sessions.live()
    assert value == {
        "id": session.opening.context_id,
        "object": "context",
        "model": "tiny",
        "mode": "update",
        "status": "open",
        "sequence": 0,
        "segments": 0,
        "prompt_tokens": 2,
        "computed_tokens": 0,
        "max_context_tokens": 200,
    }


async def test_every_change_tells_how_far_the_context_is(api, http):
    path = await api.open()
    one = await api.append(path, "one ")
    other = await api.append(path, "two ", segment="b")
    assert [each["sequence"] for each in (one, other)] == [1, 2]
    assert [each["segments"] for each in (one, other)] == [1, 2]
    assert [each["prompt_tokens"] for each in (one, other)] == [4, 8]


async def test_a_context_is_shown_as_its_last_change_showed_it(api, http):
    path = await api.open()
    changed = await api.append(path, "one ")
    shown = (await http.get(path)).json()
    assert {**shown, "computed_tokens": 0} == {**changed, "computed_tokens": 0}


async def test_what_the_workers_have_computed_is_shown(api, http):
    path = await api.open()
    await api.append(path, "one two three ")
    await api.append(path, "four five ")
    async with asyncio.timeout(PATIENCE_S):
        while not (shown := (await http.get(path)).json())["computed_tokens"]:  # noqa: ASYNC110 told by no event
            await asyncio.sleep(0.01)
    assert 0 < shown["computed_tokens"] < shown["prompt_tokens"] == 24


async def test_showing_a_context_changes_nothing(api, http):
    path = await api.open()
    for _ in range(3):
        assert (await http.get(path)).json()["sequence"] == 0


async def test_a_closed_context_is_shown_as_closed(api, http):
    path = await api.open()
    await api.append(path, "one ")
    await http.post(f"{path}/close", json={"query": "?"})
    shown = (await http.get(path)).json()
    assert (shown["status"], shown["sequence"], shown["prompt_tokens"]) == ("closed", 2, 5)


# -- Numbers ----------------------------------------------------------------------


async def test_a_change_that_is_sent_again_with_its_number_is_made_once(api, http, frontend, text):
    path = await api.open()
    for number, words in ((1, "one "), (1, "one "), (2, "two "), (1, "one "), (2, "two ")):
        shown = await api.append(path, words, sequence=number)
    assert (shown["sequence"], shown["prompt_tokens"]) == (2, 8)
    await http.post(f"{path}/close", json={"sequence": 3})
    assert text.decode(frontend.requests[0].prompt) == "one two "


async def test_a_change_that_was_refused_is_refused_again_under_its_number(api, http):
    path = await api.open()
    await api.append(path, "one ", sequence=1)
    for _ in range(2):
        response = await http.post(f"{path}/append", json={"text": "x" * 300, "sequence": 2})
        assert api.error_of(response, 400)["code"] == "context_length_exceeded"
    assert (await api.append(path, "two ", sequence=3))["prompt_tokens"] == 8


async def test_a_gap_in_the_numbers_is_refused_and_changes_nothing(api, http):
    path = await api.open()
    await api.append(path, "one ", sequence=1)
    error = api.error_of(await http.post(f"{path}/append", json={"text": "three ", "sequence": 3}), 400)
    assert (error["param"], error["code"]) == ("sequence", "invalid_request")
    assert (await api.append(path, "two ", sequence=2))["prompt_tokens"] == 8


async def test_numbers_may_be_given_to_some_changes_and_not_to_others(api, http):
    path = await api.open()
    assert (await api.append(path, "one "))["sequence"] == 1
    assert (await api.append(path, "two ", sequence=2))["sequence"] == 2
    assert (await api.append(path, "three "))["sequence"] == 3


async def test_of_many_appends_at_the_same_time_without_numbers_none_is_lost(api, http, frontend, text):
    path = await api.open()
    words = [f"<{number}>" for number in range(12)]
    shown = await asyncio.gather(*(api.append(path, word) for word in words))
    assert max(each["sequence"] for each in shown) == 12
    await http.post(f"{path}/close", json={})
    prompt = text.decode(frontend.requests[0].prompt)
    assert sorted(prompt.replace(">", "> ").split()) == sorted(words)


async def test_an_append_that_another_one_overtakes_is_not_lost(api, http, ingestors, frontend, text):
    """The slow one hears of the other's number, which it has taken for itself, before its own is refused."""
    path = await api.open()
    is_held, may_go = asyncio.Event(), asyncio.Event()

    async def hold(request):
        if request.operation.append.text == b"slow ":
            is_held.set()
            await may_go.wait()

    ingestors.gate = hold
    async with asyncio.timeout(PATIENCE_S):
        slow = asyncio.ensure_future(api.append(path, "slow "))
        await is_held.wait()
        assert (await api.append(path, "quick "))["sequence"] == 1
        # Both calls are told of it.
        slow_call = ingestors.calls[1]
        await ingestors.until(lambda _: any(each.state.applied_sequence == 1 for each in slow_call))
        may_go.set()
        assert (await slow)["sequence"] == 2
    await http.post(f"{path}/close", json={})
    assert text.decode(frontend.requests[0].prompt) == "quick slow "


# -- The end of a context ---------------------------------------------------------


async def deleted(api, http, path):
    response = await http.delete(path)
    assert response.status_code == 200, response.text
    assert response.json() == {"id": path.rpartition("/")[2], "object": "context.deleted", "deleted": True}
    api.error_of(await http.get(path), 404)


async def test_a_deleted_context_is_gone_and_so_is_its_work(api, http, ingestor):
    path = await api.open()
    await api.append(path, "one ")
    await deleted(api, http, path)
    assert ingestor.sessions.live() == []
    for verb, body in (("append", {"text": "x"}), ("close", {})):
        api.error_of(await http.post(f"{path}/{verb}", json=body), 404)
    api.error_of(await http.delete(path), 404)


async def test_deleting_a_context_ends_its_answer(api, http, frontend, may_go_on):
    path = await api.open()
    answering = asyncio.ensure_future(http.post(f"{path}/close", json={"query": "?"}))
    async with asyncio.timeout(PATIENCE_S):
        await frontend.until(submitted=1)
        await deleted(api, http, path)
        assert api.error_of(await answering, 499)["code"] == "cancelled"
        await frontend.until(ended=1)


async def test_a_context_whose_answer_is_complete_can_be_deleted(api, http):
    path = await api.open()
    await http.post(f"{path}/close", json={"query": "?"})
    await deleted(api, http, path)


@pytest.mark.parametrize("clock", [VirtualClock(1000.0)], ids=["virtual"])
async def test_a_context_that_nothing_came_for_says_so_when_it_is_asked_for(api, http, ingestor, clock):
    path = await api.open()
    clock.advance(ingestor.parts.config.idle_s)
    ingestor.sessions.sweep()
    assert api.error_of(await http.get(path), 504)["code"] == "deadline_exceeded"
    assert api.error_of(await http.post(f"{path}/append", json={"text": "x"}), 504)["code"] == "deadline_exceeded"


@pytest.mark.parametrize("clock", [VirtualClock(1000.0)], ids=["virtual"])
async def test_a_context_lives_no_longer_than_its_timeout(api, http, ingestor, clock):
    path = await api.open(timeout=30)
    clock.advance(30)
    ingestor.sessions.sweep()
    assert api.error_of(await http.post(f"{path}/close", json={}), 504)["code"] == "deadline_exceeded"


@pytest.mark.parametrize("clock", [VirtualClock(1000.0)], ids=["virtual"])
async def test_the_shorter_of_two_timeouts_counts(api, http, ingestor):
    for header, body, expected_s in (("5", 20.0, 5), ("20", 7.0, 7)):
        response = await http.post(api.url, json={"timeout": body}, headers={"X-Request-Timeout": header})
        session = ingestor.sessions.resume(response.json()["id"], "default")
        assert session.opening.deadline_unix_ms == 1_000_000 + 1000 * expected_s
