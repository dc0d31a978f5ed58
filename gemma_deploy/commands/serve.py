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
    from gemma_deploy.serve.request import Scheduling

log = logging.getLogger(__name__)
LARGEST_KEYS = 1 << 16  # bytes of a file of keys
LEAST_KEY = 8
EPILOG = """\b
Examples:
  gemma-deploy serve workspace/NAME
  gemma-deploy serve workspace/NAME --alias gpt-4o-mini --batch-size 8 --max-context 4096
  gemma-deploy serve workspace/ONE workspace/OTHER --port 8000
  gemma-deploy serve workspace/NAME --host 0.0.0.0 --api-key-file keys.txt
  gemma-deploy serve workspace/NAME --adapter pirate --adapter poet=runs/poet/adapter
  gemma-deploy serve workspace/NAME --cluster 10.0.0.1:6379 --replicas 2 --threads 8

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
@click.option(
    "--adapter",
    type=NAME,
    multiple=True,
    metavar="NAME[=DIR]",
    help="A LoRA adapter that requests may name, as ARTIFACT:NAME: a directory of peft's, or one that the artifact "
    "keeps. Of several artifacts' one ARTIFACT:NAME=DIR. Repeatable.",
)
@click.option(
    "--allow-adapters", type=PATH, metavar="DIR", help="Let requests load adapters from below DIR, and unload them."
)
@click.option("--add-bos", is_flag=True, help="Put BOS in front of prompts of token ids that have none.")
@click.option("--allow-origin", type=NAME, multiple=True, help="A web page's origin that browsers let ask. Repeatable.")
@click.option("--connections", type=click.IntRange(1, 60_000), default=1000, show_default=True, help="At most.")
@click.option(
    "--grace", type=click.IntRange(0, 3600), default=60, show_default=True, help="Seconds to end after SIGTERM."
)
@click.option("--json-log", is_flag=True, help="A line of JSON for each answer.")
@click.option(
    "--cluster", type=NAME, metavar="HOST:PORT", help="Compute on actors of the Ray cluster with this head, or `auto`."
)
@click.option("--replicas", type=click.IntRange(1, 1024), help="Of each artifact on the cluster  [default: 1]")
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
    adapter: tuple[str, ...],
    allow_adapters: Path | None,
    add_bos: bool,
    allow_origin: tuple[str, ...],
    connections: int,
    grace: int,
    json_log: bool,
    cluster: str | None,
    replicas: int | None,
) -> None:
    """Answer requests to one or several ARTIFACTs over HTTP, as OpenAI's servers do."""
    from gemma_deploy import extras

    extras.require("serve", what="`gemma-deploy serve`")
    from gemma_deploy.artifact.check import open_whole
    from gemma_deploy.engine import open_embedder, open_engine
    from gemma_deploy.serve.cluster.opening import Joined, refuse
    from gemma_deploy.serve.http.app import Server, Settings
    from gemma_deploy.serve.http.embeddings import ServedEncoder
    from gemma_deploy.serve.http.running import listening, log_apart, loopback, open_enough, run, server_of
    from gemma_deploy.serve.http.served import Served
    from gemma_deploy.serve.opening import Limits, scheduling_of, worker_of
    from gemma_deploy.serve.visitors import LOOPBACK

    keys = _keys(api_key_file) if api_key_file is not None else ()
    if not keys and not insecure and not loopback(host):
        _refuse_open(host)
    if allow_adapters is not None:
        _check_allowed(allow_adapters, keyless=not keys and not loopback(host))
    refuse(cluster, replicas=replicas, adapters=bool(adapter) or allow_adapters is not None)
    opened = [open_whole(one, hashes=True) for one in artifact]
    names = _names(opened, alias)
    adapters = _adapters(adapter, opened, names)
    at_a_time = open_enough(connections)
    bound = listening(host, port)
    limits = Limits(together=batch_size, queue=queue, context=max_context or 0, cache_bytes=cache_mib * MIB)
    joined = Joined(cluster, opened, replicas=replicas or 1, threads=threads) if cluster is not None else None
    if joined is not None:
        click.get_current_context().call_on_close(joined.close)
    served: list[Served] = []
    encoders: list[ServedEncoder] = []
    for one, called in zip(opened, names, strict=True):
        if one.manifest.model.sentence is not None:
            encoders.append(ServedEncoder(open_embedder(one, threads=threads), one, called))
            continue
        engine = open_engine(one, threads=threads)
        if joined is not None:
            served.append(Served(engine, joined.computing(engine, limits), called, add_bos=add_bos))
        else:
            scheduling = scheduling_of(engine, **limits)
            numbers = {name: _loaded(scheduling, place) for name, place in adapters[called[0]].items()}
            served.append(Served(engine, worker_of(engine, scheduling), called, add_bos=add_bos, adapters=numbers))
        if served[-1].together == 1 and batch_size > 1:
            log.warning("%s: its back end computes one text at a time; others wait", called[0])
    log_apart(as_json=json_log)
    # Who brings a key is known; who may ask from elsewhere may use any name.
    hosts = None if keys or insecure else frozenset((*LOOPBACK, host))
    settings = Settings(keys=keys, hosts=hosts, origins=allow_origin, json_log=json_log, adapters=allow_adapters)
    shown = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}/v1"

    def ready() -> None:
        known = [*(name for one in served for name in one.called()), *(name for one in encoders for name in one.names)]
        click.echo(f"serving {', '.join(known)} at {shown}")

    app = Server(served, settings, encoders=encoders).app()
    if run(server_of(app, grace=grace, connections=connections, at_a_time=at_a_time), bound, ready):
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


def _check_allowed(folder: Path, *, keyless: bool) -> None:
    """See that requests may load adapters from a directory.

    Raises:
        UsageError: there is none, or who reaches the server from elsewhere could do it without a key.
    """
    from gemma_deploy import reading
    from gemma_deploy.errors import UsageError

    if keyless:
        raise UsageError(
            "--allow-adapters: others than this machine could load adapters without a key",
            next_step="give --api-key-file, or leave --allow-adapters out",
        )
    if not reading.is_dir(folder):
        raise UsageError(
            reading.why_absent(folder) or "is no directory",
            where=str(folder),
            expected="a directory below which adapters lie",
            next_step="check the path (--allow-adapters)",
        )


def _adapters(
    given: Sequence[str], opened: Sequence[Artifact], names: Sequence[Sequence[str]]
) -> dict[str, dict[str, str]]:
    """By each artifact's own name, its adapters: what they are called, and where they are.

    Raises:
        UsageError: one has no name, or that of another; it is not said of which artifact it is; that makes no text.
    """
    from gemma_deploy.errors import UsageError
    from gemma_deploy.serve.http.adapters import check_name

    every = {name for called in names for name in called}
    found: dict[str, dict[str, str]] = {called[0]: {} for called in names}
    for one in given:
        left, equals, place = one.partition("=")
        model, _, name = left.rpartition(":")
        which = [called for called in names if model in called] if model else list(names)
        if len(which) != 1:
            raise UsageError(
                f"--adapter {one}: of which artifact?",
                expected=f"ARTIFACT:NAME=DIR, ARTIFACT one of {', '.join(sorted(every))}",
                next_step="say it",
            )
        check_name(name, which[0], every)
        adapters = found[which[0][0]]
        if name in adapters:
            raise UsageError(f"--adapter {one}: another one is called {name}", next_step="give it another name")
        if equals and not place:
            raise UsageError(f"--adapter {one}: the directory is missing", next_step="name one, or leave the = out")
        adapters[name] = place or name
    for artifact, called in zip(opened, names, strict=True):
        if found[called[0]] and artifact.manifest.model.sentence is not None:
            raise UsageError(
                "an artifact that makes vectors takes no adapters",
                where=str(artifact.path),
                next_step="leave --adapter out",
            )
    return found


def _loaded(scheduling: Scheduling, place: str) -> int:
    """The number of an adapter, loaded."""
    from gemma_deploy import reading

    return scheduling.load(scheduling.prepare(reading.expand(place)))
