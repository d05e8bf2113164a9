"""The command `headrace`. Every command imports what it needs when it runs, so that help is quick."""

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace import settings
from headrace.cli.chat import chat
from headrace.cli.complete import complete
from headrace.cli.demo import demo
from headrace.cli.models import models
from headrace.cli.serve import Role
from headrace.cli.serve import serve as run_role
from headrace.errors import ConfigError, HeadraceError, NotReady, PeerFailed

if TYPE_CHECKING:
    from headrace.cli.state import ClusterState

app = typer.Typer(
    name="headrace",
    help="Disaggregated LLM serving: prefill and decode apart, KV blocks moved between them.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)

doctor = typer.Typer(help="Measure what a cluster is built on.", no_args_is_help=True)
app.add_typer(doctor, name="doctor")
app.add_typer(demo, name="demo")
app.command()(chat)
app.command()(complete)
app.command()(models)


RunDir = Annotated[Path | None, typer.Option("--run-dir", help="State of the cluster; default .run")]
Assignments = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Set one option.")]
ClusterAssignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.NAME=VALUE", help="Set one option of a role or of one process."),
]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="auto, fp32, bf16, int8 or int4")]


@app.command()
def serve(
    role: Annotated[Role, typer.Argument(help="What to run.")],
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with a section per role.")] = None,
    assignments: Assignments = None,
    dtype: DtypeOption = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show value and origin, then leave.")] = False,
) -> None:
    """Run one service until SIGTERM."""
    code = run_role(role, file=config, assignments=assignments or (), dtype=dtype, print_config=print_config)
    raise typer.Exit(code)


@app.command()
def up(  # noqa: PLR0913 - one parameter is one option of the command
    workers: Annotated[str | None, typer.Option("--workers", help="For example prefill=2,decode=2")] = None,
    dtype: DtypeOption = None,
    model: Annotated[Path | None, typer.Option("--model", help="GGUF file or Hugging Face folder.")] = None,
    http_port: Annotated[int | None, typer.Option("--http-port", help="First port tried; default 8000")] = None,
    run_dir: RunDir = None,
    assignments: ClusterAssignments = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay until Ctrl-C.")] = False,
) -> None:
    """Start a cluster on this machine and wait until it answers."""
    from headrace.cli import layout
    from headrace.cli import up as local

    given = {"workers": workers, "dtype": dtype, "model": model, "http_port": http_port, "dir": run_dir}
    config = settings.load(
        layout.RunConfig,
        file=None,
        section="run",
        env=settings.environment(),
        overrides={name: str(value) for name, value in given.items() if value is not None},
    ).value
    planned = layout.plan(config, assignments or ())
    layout.check(planned, settings.environment())
    if foreground:
        raise typer.Exit(local.foreground(planned))
    cluster, ran_before = local.up(planned, config.ready_timeout_s)
    typer.echo(f"headrace is {'already running' if ran_before else 'ready'}: {cluster.http}  gRPC {cluster.grpc}")
    for process in cluster.processes:
        typer.echo(f"  {process.name:<12} pid {process.pid or '-':<8} gRPC {process.grpc or '-'}")


@app.command()
def down(run_dir: RunDir = None) -> None:
    """Stop the cluster on this machine."""
    from headrace.cli import up as local

    folder = _run_dir(run_dir)
    stopped = local.down(folder)
    typer.echo("headrace is stopped" if stopped else f"nothing runs in {folder}")


@app.command()
def status(
    run_dir: RunDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the processes of the cluster on this machine; exit status 1 when none runs."""
    from headrace.cli import state

    cluster = state.read(_run_dir(run_dir))
    if cluster is None or not cluster.is_running:
        typer.echo(json.dumps({"http": None, "grpc": None, "processes": []}) if as_json else "nothing runs")
        raise typer.Exit(1)
    processes = [
        dataclasses.asdict(process) | {"alive": state.is_alive(process.pid, process.started_s)}
        for process in cluster.processes
    ]
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(cluster) | {"processes": processes}, indent=2))
        return
    typer.echo(f"{cluster.http}  gRPC {cluster.grpc}  supervisor {cluster.supervisor}")
    for row in processes:
        life = "alive" if row["alive"] else "dead"
        typer.echo(
            f"  {row['name']:<12} {life:<6} pid {row['pid'] or '-':<8} {row['grpc'] or '-'}  restarts {row['restarts']}"
        )


@app.command()
def systems() -> None:
    """Show the research systems that are built in."""
    from headrace import catalog

    row = "{:<20} {:<10} {:<9} {}"
    typer.echo(row.format("name", "seams", "tokens", "paper, measured ratio"))
    for technique in map(catalog.load, catalog.names()):
        exactness = "lossless" if technique.is_lossless else "lossy"
        facts = f"{technique.paper}, {technique.url}; {technique.measured}"
        typer.echo(row.format(technique.name, ",".join(technique.seams), exactness, facts))


@doctor.command()
def transport(run_dir: RunDir = None) -> None:
    """Measure lane, bandwidth and latency between each pair of processes that hold KV blocks."""
    from headrace.cli.doctor import HEADER, measure_lanes

    pools = _pools(run_dir)
    typer.echo(HEADER)
    is_broken = False
    for lane in measure_lanes(pools):
        typer.echo(lane.row())
        is_broken |= lane.error is not None
    raise typer.Exit(int(is_broken))


@doctor.command()
def leases(run_dir: RunDir = None) -> None:
    """Show who holds KV blocks in each process, and until when."""
    from headrace.cli.leases import HEADER, list_leases

    pools = _pools(run_dir)
    typer.echo(HEADER)
    is_broken = False
    for report in list_leases(pools):
        typer.echo("\n".join(report.rows()))
        is_broken |= report.error is not None
    raise typer.Exit(int(is_broken))


@doctor.command()
def index(run_dir: RunDir = None) -> None:
    """Show each copy of the prefix index: who is in it, how current and how right it is."""
    from headrace.cli.index_report import HEADER, describe_indexes

    processes = _running(run_dir).processes
    with_copy = (Role.ROUTER.value, Role.KVSTORE.value)
    copies = {each.name: each.grpc for each in processes if each.grpc is not None and each.role in with_copy}
    typer.echo(HEADER)
    is_broken = False
    for report in describe_indexes(copies):
        typer.echo("\n".join(report.rows()))
        is_broken |= bool(report.problems)
    raise typer.Exit(int(is_broken))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(importlib.metadata.version("headrace"))


def _running(run_dir: Path | None) -> "ClusterState":
    from headrace.cli import state

    folder = _run_dir(run_dir)
    cluster = state.read(folder)
    if cluster is None or not cluster.is_running:
        raise NotReady(f"nothing runs in {folder}; start it with `headrace up`")
    return cluster


def _pools(run_dir: Path | None) -> dict[str, str]:
    """Return host:port of each process that holds KV blocks, by name."""
    without = (Role.ROUTER.value, Role.INGESTOR.value)
    processes = _running(run_dir).processes
    return {each.name: each.grpc for each in processes if each.grpc is not None and each.role not in without}


def _run_dir(given: Path | None) -> Path:
    from headrace.cli import layout

    overrides = {} if given is None else {"dir": str(given)}
    return settings.load(
        layout.RunConfig, file=None, section="run", env=settings.environment(), overrides=overrides
    ).value.dir


def main() -> None:
    """Run the command; errors of headrace become one line and exit status 1, bad settings 2."""
    try:
        app()
    except HeadraceError as error:
        typer.echo(f"headrace: {error}", err=True)
        if isinstance(error, PeerFailed):
            typer.echo("Does the cluster run? `headrace status` shows it, `headrace up` starts it.", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
