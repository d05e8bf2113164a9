"""The command `headrace chat`."""

import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.connect import Address, MaxTokens, RunDir, Seed, Temperature, connect, show
from headrace.errors import HeadraceError

if TYPE_CHECKING:
    from headrace import Client, GenerateOptions, Message


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
    with connect(address, run_dir) as client:
        conversation = Conversation(client, system, options)
        if once is not None:
            conversation.say(once)
        else:
            _converse(conversation)


class Conversation:
    """Owns the messages of a chat.

    Args:
        client: Who answers.
        system: First message, if any.
        options: Used for every answer.
    """

    def __init__(self, client: "Client", system: str | None, options: "GenerateOptions") -> None:
        self._client = client
        self._options = options
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def say(self, text: str) -> None:
        """Send a message and print the answer.

        A message that got no answer is forgotten, so that the chat stays what the model has seen.

        Raises:
            HeadraceError: the call failed.
            KeyboardInterrupt: the answer was stopped; the work in the cluster is, too.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            with self._client.stream_chat(self.messages, **self._options) as stream:
                answer = show(stream)
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer.text})


def _converse(conversation: Conversation) -> None:
    # A shell that starts commands in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            line = _ask()
            if line is None:
                return
            if line.strip():
                conversation.say(line)
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
