"""The command `headrace chat`."""

import asyncio
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.connect import Address, MaxTokens, RunDir, Seed, Temperature, connect_async, show
from headrace.errors import HeadraceError

if TYPE_CHECKING:
    from headrace import AsyncClient, GenerateOptions, Message


def chat(  # noqa: PLR0913 - one parameter is one option of the command
    once: Annotated[str | None, typer.Option("--once", help="Send this one message and leave.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="First message of the chat.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    address: Address = None,
    run_dir: RunDir = None,
) -> None:
    """Talk with the model; Ctrl-C stops an answer, Ctrl-D leaves."""
    options: GenerateOptions = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    # An event loop cancels what runs on Ctrl-C; an exception out of the midst of gRPC could leave a lock of its held.
    with asyncio.Runner() as runner:
        client = runner.run(connect_async(address, run_dir))
        conversation = Conversation(client, system, options)
        try:
            if once is not None:
                runner.run(conversation.say(once))
            else:
                _converse(runner, conversation)
        finally:
            runner.run(client.close())


class Conversation:
    """Owns the messages of a chat.

    Args:
        client: Who answers.
        system: First message, if any.
        options: Used for every answer.
    """

    def __init__(self, client: "AsyncClient", system: str | None, options: "GenerateOptions") -> None:
        self._client = client
        self._options = options
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    async def say(self, text: str) -> None:
        """Send a message and print the answer.

        A message that got no answer is forgotten, so that the chat stays what the model has seen.

        Raises:
            HeadraceError: the call failed.
            CancelledError: the answer was stopped; the work in the cluster is, too.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            async with self._client.stream_chat(self.messages, **self._options) as stream:
                answer = await show(stream)
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer.text})


def _converse(runner: asyncio.Runner, conversation: Conversation) -> None:
    # A shell that starts commands in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            line = _ask()
            if line is None:
                return
            if line.strip():
                runner.run(conversation.say(line))
        except KeyboardInterrupt:
            typer.secho("\n[stopped; Ctrl-D leaves]", err=True, dim=True)
        except HeadraceError as error:
            typer.echo(f"headrace: {error}", err=True)


def _ask() -> str | None:
    """Return the next message without its newline, or None at the end of input."""
    if sys.stdin.isatty():
        typer.echo("> ", nl=False, err=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
