"""The command `headrace complete`."""

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.connect import Address, MaxTokens, RunDir, Seed, Temperature, connect_async, show

if TYPE_CHECKING:
    from headrace import GenerateOptions


def complete(  # noqa: PLR0913 - one parameter is one option of the command
    prompt: Annotated[str, typer.Argument(help="Text to go on from; - reads it from stdin.")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the answer; repeatable.")] = None,
    address: Address = None,
    run_dir: RunDir = None,
) -> None:
    """Go on from a text, without a chat template."""
    text = sys.stdin.read() if prompt == "-" else prompt
    options: GenerateOptions = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": stop}

    async def run() -> None:
        async with await connect_async(address, run_dir) as client, client.stream(text, **options) as stream:
            await show(stream)

    asyncio.run(run())
