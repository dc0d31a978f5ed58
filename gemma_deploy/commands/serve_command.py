"""`gemma-deploy serve-command`: what to type where another program serves an artifact."""

from __future__ import annotations

import shlex

import click

from gemma_deploy.options import NAME, PATH

EPILOG = """\b
Examples:
  gemma-deploy serve-command workspace/NAME
  gemma-deploy serve-command workspace/NAME --tensor-parallel-size 2 --port 8000
  gemma-deploy serve-command workspace/NAME --pipeline-parallel-size 2 --ray
  gemma-deploy serve-command workspace/NAME --cpu --tensor-parallel-size 2

Of backend.type vllm it is vLLM's command, of gguf llama.cpp's; others are served by `gemma-deploy serve`. Runs nothing.
"""


@click.command("serve-command", epilog=EPILOG)
@click.argument("artifact", type=PATH)
@click.option("--host", type=NAME, default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=9000, show_default=True, help="Port to listen on.")
@click.option(
    "--tensor-parallel-size", type=click.IntRange(1), default=1, show_default=True, help="Devices that share a layer."
)
@click.option(
    "--pipeline-parallel-size", type=click.IntRange(1), default=1, show_default=True, help="Groups that share layers."
)
@click.option("--ray", is_flag=True, help="Devices of several machines of a Ray cluster.")
@click.option("--cpu", is_flag=True, help="Of vLLM: on processors of this machine, a share of them for each device.")
def command(
    artifact: str, host: str, port: int, tensor_parallel_size: int, pipeline_parallel_size: int, *, ray: bool, cpu: bool
) -> None:
    """Print the command that serves ARTIFACT."""
    from gemma_deploy.artifact.check import file_problems, refuse
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.backends import backend_of
    from gemma_deploy.backends.base import Serving

    opened = Artifact.open(artifact)
    refuse(opened, file_problems(opened))
    how = Serving(host, port, tensor_parallel_size, pipeline_parallel_size, ray, cpu)
    click.echo(shlex.join(backend_of(opened.manifest).serve_command(opened, how)))
