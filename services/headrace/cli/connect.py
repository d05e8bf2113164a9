"""Find the cluster that a client command means, and speak to it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.errors import ConfigError

if TYPE_CHECKING:
    from headrace import Answer, AsyncClient, AsyncStream, Client

Address = Annotated[
    str | None,
    typer.Option("--address", help="host:port of the router; default: the cluster of `headrace up`, else port 50051."),
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", help="Most tokens of an answer; default: what the context holds.")
]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0 is greedy; default 1.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes answers repeatable.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="State of the cluster; default .run")]

# Codes below space except tab and newline, and those after delete: an answer must not steer the terminal.
_CONTROL = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10}, "\N{REPLACEMENT CHARACTER}")


def connect(address: str | None, run_dir: Path | None) -> "Client":
    """Return a client of the router at `address`, else of the cluster that runs on this machine."""
    _be_quiet()
    from headrace import Client

    return Client(router_address(address, run_dir))


async def connect_async(address: str | None, run_dir: Path | None) -> "AsyncClient":
    """Return a client of the same router for the running event loop, which ends a call on Ctrl-C."""
    _be_quiet()
    from headrace import AsyncClient

    return AsyncClient(router_address(address, run_dir))


def router_address(given: str | None, run_dir: Path | None) -> str:
    """Return the address a command means: the given one, else that of the cluster that runs here.

    Raises:
        ConfigError: no cluster runs in the folder that was named.
    """
    found = given or _running(run_dir)
    if found is None and run_dir is not None:
        raise ConfigError(f"no cluster runs in {run_dir}: start one there, or give --address", field="run-dir")
    return found or "127.0.0.1:50051"


async def show(stream: "AsyncStream") -> "Answer":
    """Print an answer as it arrives, then its times on stderr."""
    is_terminal = os.isatty(1)
    async for piece in stream:
        typer.echo(piece.text.translate(_CONTROL) if is_terminal else piece.text, nl=False)
    typer.echo()
    answer = await stream.answer()
    typer.secho(_times(answer), err=True, dim=True)
    return answer


def _be_quiet() -> None:
    # The C library reports every connection that a server closes; a command's stderr is for people.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def _times(answer: "Answer") -> str:
    parts = [f"TTFT {answer.ttft_s * 1000:.0f} ms", f"{answer.tokens_per_s:.1f} tokens/s"]
    if answer.usage is not None:
        usage = answer.usage
        parts.append(f"{usage.completion_tokens} tokens")
        parts.append(f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens cached")
    return "[" + ", ".join(parts) + "]"


def _running(run_dir: Path | None) -> str | None:
    from headrace import settings
    from headrace.cli import layout, state

    overrides = {} if run_dir is None else {"dir": str(run_dir)}
    found = settings.load(layout.RunConfig, file=None, section="run", env=settings.environment(), overrides=overrides)
    cluster = state.read(found.value.dir)
    return cluster.grpc if cluster is not None and cluster.is_running else None
