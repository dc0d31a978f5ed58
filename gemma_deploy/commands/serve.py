"""`gemma-deploy serve`: OpenAI's HTTP interface in front of artifacts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy.generation import INTERRUPTED
from gemma_deploy.names import MIB
from gemma_deploy.options import NAME, PATH

if TYPE_CHECKING:
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.serve.http.served import Served

log = logging.getLogger(__name__)
LARGEST_KEYS = 1 << 16  # bytes of a file of keys
LEAST_KEY = 8
EPILOG = """\b
Examples:
  gemma-deploy serve workspace/NAME
  gemma-deploy serve workspace/NAME --alias gpt-4o-mini --batch-size 8 --max-context 4096
  gemma-deploy serve workspace/ONE workspace/OTHER --port 8000
  gemma-deploy serve workspace/NAME --host 0.0.0.0 --api-key-file keys.txt

Artifacts of `backend.type: native` answer many requests at once, all others one after the other. SIGTERM ends it when
what is being answered is done.
"""


@click.command("serve", epilog=EPILOG)
@click.argument("artifact", type=PATH, nargs=-1, required=True)
@click.option("--host", type=NAME, default="127.0.0.1", show_default=True, help="Others than this machine need a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=9000, show_default=True, help="0 takes a free one.")
@click.option("--batch-size", type=click.IntRange(1, 256), default=16, show_default=True, help="Texts in a step.")
@click.option("--max-context", type=click.IntRange(min=2), help="Tokens of a text  [default: the artifact's context]")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, show_default=True, help="0 takes all cores.")
@click.option("--cache-mib", type=click.IntRange(1), default=8192, show_default=True, help="Keys and values, at most.")
@click.option("--queue", type=click.IntRange(0, 100_000), default=256, show_default=True, help="Requests that wait.")
@click.option("--api-key-file", type=PATH, help="Keys, one a line; a request must bring one of them.")
@click.option("--insecure", is_flag=True, help="Answer everybody on another host than this machine without a key.")
@click.option("--alias", type=NAME, multiple=True, help="Another name for the artifact. Repeatable.")
@click.option("--add-bos", is_flag=True, help="Put BOS in front of prompts of token ids that have none.")
@click.option("--allow-origin", type=NAME, multiple=True, help="A web page's origin that browsers let ask. Repeatable.")
@click.option("--connections", type=click.IntRange(1, 60_000), default=1000, show_default=True, help="At most.")
@click.option(
    "--grace", type=click.IntRange(0, 3600), default=60, show_default=True, help="Seconds to end after SIGTERM."
)
@click.option("--json-log", is_flag=True, help="A line of JSON for each answer.")
def command(
    artifact: tuple[Path, ...],
    host: str,
    port: int,
    batch_size: int,
    max_context: int | None,
    threads: int,
    cache_mib: int,
    queue: int,
    api_key_file: Path | None,
    insecure: bool,
    alias: tuple[str, ...],
    add_bos: bool,
    allow_origin: tuple[str, ...],
    connections: int,
    grace: int,
    json_log: bool,
) -> None:
    """Answer requests to one or several ARTIFACTs over HTTP, as OpenAI's servers do."""
    from gemma_deploy import extras

    extras.require("serve", what="`gemma-deploy serve`")
    from gemma_deploy.artifact.check import open_whole
    from gemma_deploy.engine import open_embedder, open_engine
    from gemma_deploy.serve.http.app import Server, Settings
    from gemma_deploy.serve.http.embeddings import ServedEncoder
    from gemma_deploy.serve.http.running import listening, log_apart, loopback, open_enough, run, server_of
    from gemma_deploy.serve.http.served import Served
    from gemma_deploy.serve.opening import scheduling_of
    from gemma_deploy.serve.visitors import LOOPBACK

    keys = _keys(api_key_file) if api_key_file is not None else ()
    if not keys and not insecure and not loopback(host):
        _refuse_open(host)
    opened = [open_whole(one, hashes=True) for one in artifact]
    names = _names(opened, alias)
    open_enough(connections)
    bound = listening(host, port)
    served: list[Served] = []
    encoders: list[ServedEncoder] = []
    for one, called in zip(opened, names, strict=True):
        if one.manifest.model.sentence is not None:
            encoders.append(ServedEncoder(open_embedder(one, threads=threads), one, called))
            continue
        engine = open_engine(one, threads=threads)
        scheduling = scheduling_of(
            engine, together=batch_size, queue=queue, context=max_context or 0, cache_bytes=cache_mib * MIB
        )
        served.append(Served(engine, scheduling, called, add_bos=add_bos))
        if scheduling.together == 1 and batch_size > 1:
            log.warning("%s: its back end computes one text at a time; others wait", called[0])
    log_apart(as_json=json_log)
    # Who brings a key is known; who may ask from elsewhere may use any name.
    hosts = None if keys or insecure else frozenset((*LOOPBACK, host))
    settings = Settings(keys=keys, hosts=hosts, origins=allow_origin, json_log=json_log)
    shown = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}/v1"

    def ready() -> None:
        click.echo(f"serving {', '.join(name for called in names for name in called)} at {shown}")

    if run(
        server_of(Server(served, settings, encoders=encoders).app(), grace=grace, connections=connections), bound, ready
    ):
        raise click.exceptions.Exit(INTERRUPTED)


def _refuse_open(host: str) -> None:
    from gemma_deploy.errors import UsageError

    raise UsageError(
        f"--host {host}: others than this machine could ask without a key",
        next_step="give --api-key-file, or --insecure where the network is to be trusted",
    )


def _keys(file: Path) -> tuple[str, ...]:
    """The keys of a file.

    Raises:
        UsageError: it cannot be read, or holds none, or one that is too short or not ASCII.
    """
    from gemma_deploy.errors import UsageError
    from gemma_deploy.reading import FileKind, read_text

    kind = FileKind(
        error=UsageError,
        expected="keys, one a line",
        next_step="name a file that holds them",
        unreadable="allow reading it",
        limit_bytes=LARGEST_KEYS,
    )
    lines = [line.strip() for line in read_text(file, kind).splitlines()]
    keys = tuple(dict.fromkeys(line for line in lines if line))
    if not keys or any(len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() for key in keys):
        raise UsageError(
            "holds no keys, or one that is none",
            where=str(file),
            expected=f"one a line, each of {LEAST_KEY} printable ASCII characters or more",
            next_step="write one, such as `openssl rand -hex 24` gives",
        )
    return keys


def _names(opened: Sequence[Artifact], alias: Sequence[str]) -> list[list[str]]:
    """What each artifact is called.

    Raises:
        UsageError: two have one name, or an alias is given for several.
    """
    from gemma_deploy.errors import UsageError

    names = [[one.manifest.name] for one in opened]
    if alias and len(opened) > 1:
        raise UsageError("--alias is for one artifact", next_step="leave it out, or serve one artifact")
    names[0] += [one for one in alias if one not in names[0]]
    every = [name for called in names for name in called]
    twice = sorted({name for name in every if every.count(name) > 1})
    if twice:
        raise UsageError(
            f"several artifacts are called {', '.join(twice)}", next_step="compile one of them under another name"
        )
    return names
