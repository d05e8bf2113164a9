"""Contexts in text: SDK and HTTP, router, ingestor, workers; the real model and transport."""

import asyncio
import random
import re
import signal
import subprocess
import sys
from pydoc_data.topics import topics

import httpx
import pytest

from headrace import AsyncClient, ContextOverflow, DeadlineExceeded, UnknownContext

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

TEXT = "\n".join(topics.values())
QUICK = ("ingestor.grace_s=1.0", "ingestor.idle_s=3.0")
GREEDY = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}


async def one_shot(client, text):
    return (await client.generate(text, **GREEDY)).token_ids


def cuts_of(raw, num_cuts, seed):
    """The bytes of a text in pieces of any size, also cut inside characters."""
    places = sorted(random.Random(seed).sample(range(1, len(raw)), num_cuts))
    return [raw[start:end] for start, end in zip([0, *places], [*places, len(raw)], strict=True)]


def test_a_context_cut_anywhere_has_the_answer_of_its_whole_text(start_cluster):
    cluster = start_cluster("prefill=1,decode=1", "fp32", *QUICK)
    cluster.wait_connected()
    before = cluster.footprint()
    text = TEXT[:3000] + "Größe 水車 und Mühlbach — 🌊. " * 20

    async def stream():
        async with AsyncClient(cluster.grpc) as client:
            async with client.context("Read this: ", **GREEDY) as context:
                for piece in cuts_of(text.encode(), 30, seed=1):
                    await context.append(piece)
                state = await context.checkpoint()
                assert state.num_computed > 0.9 * state.num_tokens
                answer = await context.close(" What is it about?").answer()
            assert answer.token_ids == await one_shot(client, f"Read this: {text} What is it about?")

    asyncio.run(stream())
    cluster.assert_no_leaks(before)


def test_an_updated_context_has_the_answer_of_what_it_became(start_cluster):
    cluster = start_cluster("prefill=1,decode=1", "fp32", *QUICK)
    passages = [(f"p{number}", TEXT[1000 * number : 1000 * (number + 1)]) for number in range(6)]

    async def stream():
        async with AsyncClient(cluster.grpc) as client:
            async with client.context(mode="update", **GREEDY) as context:
                await context.update(passages[:4])
                await context.checkpoint()
                await context.update([passages[0], passages[1], passages[5]])
                await context.replace("p1", [passages[4], passages[2]])
                answer = await context.close("So?").answer()
            whole = "".join(text for _, text in (passages[0], passages[4], passages[2])) + "So?"
            assert answer.token_ids == await one_shot(client, whole)

    asyncio.run(stream())
    cluster.wait_quiet()


def test_a_context_over_http_has_the_answer_of_the_chat(start_cluster):
    cluster = start_cluster("prefill=1,decode=1", "fp32", *QUICK)
    system = {"role": "system", "content": "Be brief."}
    options = {"max_tokens": 8, "temperature": 0.0}
    with httpx.Client(base_url=f"{cluster.http}/v1", timeout=60.0) as http:
        name = http.post("/contexts", json={"messages": [system], **options}).json()["id"]
        for start in range(0, 2000, 500):
            shown = http.post(f"/contexts/{name}/append", json={"text": TEXT[start : start + 500]})
            assert shown.status_code == 200
        answer = http.post(f"/contexts/{name}/close", json={"query": " Why?"}).json()
        chat = [system, {"role": "user", "content": TEXT[:2000] + " Why?"}]
        expected = http.post("/chat/completions", json={"messages": chat, **options}).json()
    assert answer["choices"] == expected["choices"]
    assert answer["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    cluster.wait_quiet()


def test_an_overflow_in_the_midst_leaves_a_context_that_can_be_shortened(start_cluster):
    cluster = start_cluster("prefill=1,decode=1", "fp32", *QUICK)

    async def stream():
        async with AsyncClient(cluster.grpc) as client, client.context(mode="update", **GREEDY) as context:
            await context.append(TEXT[:20_000], "long")
            with pytest.raises(ContextOverflow, match=r"\d{4,} tokens") as overflow:
                await context.append(TEXT[20_000:60_000], "longer")
            assert overflow.value.num_tokens > context.max_context_tokens - GREEDY["max_tokens"]
            await context.update([("short", "A short text.")])
            answer = await context.close(" Then?").answer()
            assert answer.token_ids == await one_shot(client, "A short text. Then?")

    asyncio.run(stream())
    cluster.wait_quiet()


@pytest.mark.parametrize("victim", ["router", "prefill-0"])
def test_a_context_outlives_the_death_of_a_process_on_its_way(start_cluster, victim):
    cluster = start_cluster("prefill=1,decode=1", "fp32", "ingestor.grace_s=20.0")
    cluster.wait_connected()

    async def stream():
        async with AsyncClient(cluster.grpc, retries=30) as client:
            async with client.context(**GREEDY) as context:
                await context.append(TEXT[:2000])
                await context.checkpoint()
                old = cluster.kill(victim, signal.SIGKILL)
                await context.append(TEXT[2000:3000])
                await asyncio.to_thread(cluster.wait_restarted, victim, old)
                await context.append(TEXT[3000:4000])
                answer = await context.close(" What?").answer()
            return answer.token_ids, await one_shot(client, TEXT[:4000] + " What?")

    answered, expected = asyncio.run(stream())
    assert answered == expected
    cluster.wait_connected()
    cluster.wait_quiet()


@pytest.mark.parametrize("victim", ["router", "prefill-0", "decode-0"])
def test_an_answer_outlives_the_death_of_a_process_on_its_way(start_cluster, victim):
    """With the settings that everybody has."""
    cluster = start_cluster("prefill=1,decode=1", "fp32")
    cluster.wait_connected()
    long = GREEDY | {"max_tokens": 64}

    async def stream():
        async with AsyncClient(cluster.grpc) as client:
            async with client.context(**long) as context:
                await context.append(TEXT[:2000])
                pieces = context.close(" What?")
                num_pieces = 0
                async for _ in pieces:
                    num_pieces += 1
                    if num_pieces == 10:
                        old = cluster.kill(victim, signal.SIGKILL)
                answered = (await pieces.answer()).token_ids
            await asyncio.to_thread(cluster.wait_restarted, victim, old)
            await asyncio.to_thread(cluster.wait_connected)
            whole = await client.generate(TEXT[:2000] + " What?", **long)
            return answered, whole.token_ids

    answered, expected = asyncio.run(stream())
    assert answered == expected
    cluster.wait_quiet()


def test_the_death_of_its_ingestor_ends_a_context_with_a_typed_error_and_frees_all(start_cluster):
    cluster = start_cluster("prefill=1,decode=1", "fp32", *QUICK)
    cluster.wait_connected()
    before = cluster.footprint()

    async def stream():
        async with AsyncClient(cluster.grpc, retries=30) as client, client.context(**GREEDY) as context:
            await context.append(TEXT[:4000])
            old = cluster.kill("ingestor", signal.SIGKILL)
            await asyncio.to_thread(cluster.wait_restarted, "ingestor", old)
            with pytest.raises(UnknownContext):
                await context.append("more ")

    asyncio.run(stream())
    cluster.wait_connected()
    cluster.assert_no_leaks(before)


def test_contexts_that_nobody_cares_for_are_freed_in_time(start_cluster):
    cluster = start_cluster("prefill=1,decode=1", "fp32", *QUICK)
    cluster.wait_connected()
    before = cluster.footprint()

    async def leave():
        """One whose client vanishes, one that falls silent, one over HTTP, one that is abandoned while it answers."""
        client = AsyncClient(cluster.grpc)
        gone = await client.context(**GREEDY).__aenter__()
        await gone.append(TEXT[:5000])
        await client.close()
        async with httpx.AsyncClient(base_url=f"{cluster.http}/v1", timeout=60.0) as http:
            name = (await http.post("/contexts", json={"prefix": TEXT[:3000]})).json()["id"]
            await http.post(f"/contexts/{name}/append", json={"text": TEXT[3000:6000]})
        async with AsyncClient(cluster.grpc) as other:
            async with other.context(max_tokens=2000, ignore_eos=True) as answering:
                await answering.append(TEXT[:1000])
                async for _ in answering.close("!"):
                    break
            async with other.context(**GREEDY) as silent:
                await silent.append(TEXT[:5000])
                with pytest.raises(DeadlineExceeded, match="nothing came"):
                    async for _ in silent.watch():
                        pass

    asyncio.run(leave())
    cluster.assert_no_leaks(before)


def test_the_demo_shows_both_ways(start_cluster):
    cluster = start_cluster("prefill=1,decode=1", "fp32", *QUICK)
    command = [sys.executable, "-m", "headrace.cli.main", "demo", "stream", "--address", cluster.grpc]
    done = subprocess.run([*command, "--tokens", "400", "--seconds", "1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "From the last piece to the first token" in done.stdout
    streamed, waited = re.findall(
        r"\[(\d+) prompt tokens, (\d+) of them computed when the last piece came", done.stdout
    )
    assert streamed[0] == waited[0]
    assert int(waited[1]) == 0 < int(streamed[1])
    refused = subprocess.run([*command, "--tokens", "20000"], capture_output=True, text=True, timeout=60)
    assert (refused.returncode, "fewer --tokens" in refused.stderr) == (1, True), refused.stderr
    cluster.wait_quiet()
