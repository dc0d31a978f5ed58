"""`gemma-deploy verify`: every hash, graph and table of an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from gemma_deploy.options import PATH

EPILOG = """\b
Examples:
  gemma-deploy verify workspace/gemma-demo-int8-128-256
  gemma-deploy verify workspace/NAME --quick
"""


@click.command("verify", epilog=EPILOG)
@click.argument("artifact", type=PATH)
@click.option("--quick", is_flag=True, help="Do not read params.safetensors (sizes only).")
def command(artifact: Path, quick: bool) -> None:
    """Check ARTIFACT; exit 1 and name every damaged file and tensor."""
    from gemma_deploy.progress import BYTES, shown
    from gemma_deploy.verifying import verify

    with shown("verify", BYTES) as tick:
        lines = verify(artifact, deep=not quick, progress=tick)
    for line in lines:
        click.echo(f"ok  {line}")
