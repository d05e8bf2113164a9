"""`headrace demo`: what headrace is for, to be seen in a terminal."""

import asyncio
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.connect import Address, RunDir, connect_async
from headrace.errors import ContextOverflow, InvalidRequest

if TYPE_CHECKING:
    from headrace import AsyncClient, AsyncContext, ContextState

QUESTION = "\n\nIn one sentence: what is this text about?"
NUM_PIECES = 24
MOST_SECONDS = 300.0
"""Less than a context may take, with time for its answer."""
MAX_ANSWER_TOKENS = 48
CHARS_PER_TOKEN = 4
"""About; how many tokens a text has is asked of the cluster."""
REFRESH_PER_S = 20

demo = typer.Typer(help="See what headrace does, on the cluster that runs here.", no_args_is_help=True)


@demo.callback()
def _group() -> None:
    """Keep the name of the only command in the command line."""


@demo.command()
def stream(
    tokens: Annotated[int, typer.Option("--tokens", min=64, help="About so many tokens of context.")] = 3000,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, max=MOST_SECONDS, help="Over which they arrive.")
    ] = 6.0,
    address: Address = None,
    run_dir: RunDir = None,
) -> None:
    """Show a context that is computed while it arrives, and what that saves against waiting for all of it."""
    with asyncio.Runner() as runner:
        client = runner.run(connect_async(address, run_dir))
        try:
            runner.run(_show_both(client, _pieces(tokens), seconds))
        except ContextOverflow as error:
            error.message += ": ask for fewer --tokens"
            raise
        finally:
            runner.run(client.close())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """How one way went; times count from the arrival of the last piece.

    Attributes:
        first_s: To the first token.
        num_tokens: Of the prompt.
        num_computed: Of them, when the last piece arrived.
        answer: What the model said.
    """

    first_s: float
    num_tokens: int
    num_computed: int
    answer: str


async def _show_both(client: "AsyncClient", pieces: Sequence[str], seconds: float) -> None:
    num_tokens, model = len(await client.tokenize("".join(pieces))), (await client.models())[0]
    if num_tokens + MAX_ANSWER_TOKENS > model.max_context_tokens:
        room = model.max_context_tokens - MAX_ANSWER_TOKENS
        raise ContextOverflow(
            f"{num_tokens} tokens of context; {model.name} has room for {room}", num_tokens=num_tokens
        )
    typer.echo(f"A context of {num_tokens} tokens arrives in {len(pieces)} pieces over {seconds:g} s.\n")
    typer.secho("Computed while it arrives", bold=True)
    streamed = await _run(client, pieces, num_tokens, seconds, waits=False)
    _tell(streamed)
    typer.secho("The same pieces at the same times, computed when all are there", bold=True)
    waited = await _run(client, pieces, num_tokens, seconds, waits=True)
    _tell(waited)
    saved_s = waited.first_s - streamed.first_s
    typer.secho(
        f"From the last piece to the first token: {streamed.first_s:.2f} s instead of {waited.first_s:.2f} s: "
        f"{waited.first_s / streamed.first_s:.1f} times as fast, {saved_s:.2f} s saved.",
        bold=True,
    )
    if streamed.answer != waited.answer:
        typer.echo("The answers differ: in this precision the order of rounding depends on how a prompt is cut.")


def _tell(run: _Run) -> None:
    typer.echo(run.answer.strip())
    typer.secho(
        f"[{run.num_tokens} prompt tokens, {run.num_computed} of them computed when the last piece came, "
        f"first token {run.first_s:.2f} s after it]\n",
        dim=True,
    )


async def _run(client: "AsyncClient", pieces: Sequence[str], num_tokens: int, seconds: float, *, waits: bool) -> _Run:
    with _bars(num_tokens) as (arrived, show):
        arriving = _arriving(pieces, seconds, arrived)
        if waits:
            # Whoever waits has no use for a context before, and one that nothing comes for would be given up.
            for _ in pieces[:-1]:
                await anext(arriving)
        # A salt of its own: neither way may find what the other has cached.
        async with (
            client.context(
                chat=[], max_tokens=MAX_ANSWER_TOKENS, temperature=0.0, cache_salt=secrets.token_hex(8)
            ) as context,
            _followed(context, show),
        ):
            last_s = time.perf_counter()
            async for piece in arriving:
                last_s = time.perf_counter()
                if not waits:
                    await context.append(piece)
            num_computed = context.state.num_computed
            if waits:
                await context.append("".join(pieces))
            first_s, texts = 0.0, []
            async for answered in context.close(QUESTION):
                first_s = first_s or time.perf_counter() - last_s
                texts.append(answered.text)
                num_tokens = answered.usage.prompt_tokens if answered.usage is not None else num_tokens
    return _Run(first_s=first_s, num_tokens=num_tokens, num_computed=num_computed, answer="".join(texts))


async def _arriving(
    pieces: Sequence[str], seconds: float, arrived: Callable[[float], None]
) -> AsyncGenerator[str, None]:
    """Yield pieces at equal distances, the last one at the end of the time."""
    begun_s = time.perf_counter()
    for number, piece in enumerate(pieces):
        due_s = begun_s + seconds * number / max(1, len(pieces) - 1)
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        arrived((number + 1) / len(pieces))
        yield piece


@contextmanager
def _bars(num_tokens: int) -> Iterator[tuple[Callable[[float], None], Callable[["ContextState"], None]]]:
    """Show how much has arrived and how much is computed; yields what takes the share that has arrived, and states."""
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("  {task.description:<9}"), BarColumn(48), TextColumn("{task.completed:>6.0f} tokens"))
    with Progress(*columns, refresh_per_second=REFRESH_PER_S) as progress:
        arriving = progress.add_task("arrived", total=num_tokens)
        computing = progress.add_task("computed", total=num_tokens)

        def arrived(share: float) -> None:
            progress.update(arriving, completed=share * num_tokens)

        def show(state: "ContextState") -> None:
            progress.update(computing, completed=min(state.num_computed, num_tokens))

        yield arrived, show


@asynccontextmanager
async def _followed(context: "AsyncContext", show: Callable[["ContextState"], None]) -> AsyncIterator[None]:
    watching = asyncio.create_task(_follow(context, show))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait([watching])


async def _follow(context: "AsyncContext", show: Callable[["ContextState"], None]) -> None:
    async for state in context.watch():
        show(state)


def _pieces(num_tokens: int) -> list[str]:
    """Return real text of about so many tokens, in pieces of equal size: it ships with Python."""
    from pydoc_data.topics import topics

    text = "\n".join(topics.values())
    size = num_tokens * CHARS_PER_TOKEN
    if size > len(text):
        limit = f"at most {len(text) // CHARS_PER_TOKEN}"
        raise InvalidRequest(f"--tokens must be {limit}, found {num_tokens}", field="tokens", limit=limit)
    step = math.ceil(size / NUM_PIECES)
    return [text[start : start + step] for start in range(0, size, step)]
