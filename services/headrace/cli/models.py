"""The command `headrace models`."""

import typer

from headrace.cli.connect import Address, RunDir, connect


def models(address: Address = None, run_dir: RunDir = None) -> None:
    """Show the models served."""
    with connect(address, run_dir) as client:
        served = client.models()
    row = "{:<40} {:>8}  {}"
    typer.echo(row.format("name", "context", "fingerprint"))
    for model in served:
        typer.echo(row.format(model.name, model.max_context_tokens, model.fingerprint))
