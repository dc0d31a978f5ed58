"""`gemma-deploy webui`: the web page for an OpenAI-compatible server."""

from __future__ import annotations

import click

from gemma_deploy.generation import INTERRUPTED
from gemma_deploy.options import NAME

CONNECTIONS = 256  # at most
GRACE_SECONDS = 3  # for replies that are being made, after Ctrl+C or SIGTERM

EPILOG = """\b
Examples:
  gemma-deploy webui --api-base-url http://127.0.0.1:9000/v1
  gemma-deploy webui --api-base-url https://models.example.com/v1 --port 9601

The server may be any that speaks OpenAI's protocol. An API key is given in the page's settings.
"""


@click.command("webui", epilog=EPILOG)
@click.option("--api-base-url", type=NAME, required=True, metavar="URL", help="The server's address, up to /v1.")
@click.option("--port", type=click.IntRange(0, 65535), default=9600, show_default=True, help="0 takes a free one.")
@click.option("--host", type=NAME, default="127.0.0.1", show_default=True, help="Address to listen on.")
def command(api_base_url: str, port: int, host: str) -> None:
    """Serve a page to chat with the models of a server, until Ctrl+C.

    What the page asks goes through this program to that server, and nowhere else.
    """
    from gemma_deploy.extras import require

    require("client", "serve", what="`gemma-deploy webui`")
    from gemma_deploy.serve.http.running import listening, loopback, run, server_of
    from gemma_deploy.serve.visitors import LOOPBACK
    from gemma_deploy.serve.webui import webui_app

    local = loopback(host)
    app = webui_app(api_base_url, hosts=frozenset((*LOOPBACK, host)) if local else None)
    bound = listening(host, port)
    shown = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}/"
    if not local:
        click.echo(f"warning: whoever reaches {shown} can ask {api_base_url} as this machine can", err=True)
    server = server_of(app, grace=GRACE_SECONDS, connections=CONNECTIONS)
    if run(server, bound, lambda: click.echo(f"open {shown}")):
        raise click.exceptions.Exit(INTERRUPTED)
