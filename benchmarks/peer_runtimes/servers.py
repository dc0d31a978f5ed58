"""Servers as data: what is installed for each, what it opens, and the command that starts it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from peer_runtimes.ours import NAME
from peer_runtimes.variants import HERE, VARIANTS, Command, Place, Variant, llamacpp

TOGETHER = 16  # texts that a server computes at once, as ours does unless told otherwise


@dataclass(frozen=True)
class Start:
    """What a command is made of.

    Args:
        bin: of the server's environment; opened: the checkpoint or what was made of it.
        port: to listen at; threads: to compute with; context: tokens of a text, prompt and answer.
    """

    bin: Path
    opened: Path
    port: int
    threads: int
    context: int


@dataclass(frozen=True)
class Server:
    """A server that speaks OpenAI's protocol, or a loop over a library.

    Args:
        command: starts it; environment: a key of ENVIRONMENTS, "" for that of this program.
        variant: how the checkpoint becomes what it opens; None where it opens the checkpoint itself.
        http: False for a loop that takes loads as lines of its standard input.
        environ: of its process; most: requests at a time, 0 for any number.
    """

    command: Callable[[Start], Command]
    environment: str = ""
    variant: Variant | None = None
    http: bool = True
    environ: Callable[[Start], dict[str, str]] = field(default=lambda start: {})
    most: int = 0


def ours(start: Start) -> Command:
    """`gemma-deploy serve`."""
    program = [sys.executable, "-m", "gemma_deploy.cli", "serve", start.opened]
    options = ["--port", start.port, "--threads", start.threads, "--batch-size", TOGETHER]
    return [*map(str, (*program, *options))]


def without_http(way: str) -> Callable[[Start], Command]:
    """What `gemma-deploy serve` or `gemma-deploy run` computes with, alone."""
    return lambda start: [
        *map(str, (sys.executable, HERE / "engine_serve.py", start.opened, way, "--threads", start.threads))
    ]


def llama_server(start: Start) -> Command:
    """Of llama.cpp: a slot for each text, nothing kept of earlier ones."""
    threads = ["-t", start.threads, "-tb", start.threads]
    slots = ["-np", TOGETHER, "-c", TOGETHER * start.context, "--cache-ram", 0]
    return [*map(str, (start.bin / "llama-server", "-m", start.opened, "--port", start.port, *threads, *slots))]


def vllm(kind: str) -> Callable[[Start], Command]:
    """Of vLLM's build for CPUs, without prefix caching; its `vllm serve` looks for a package of another name."""
    program = ("-m", "vllm.entrypoints.openai.api_server", "--model")
    return lambda start: [
        *map(str, (start.bin / "python", *program, start.opened, "--port", start.port, "--dtype", kind)),
        *("--max-model-len", str(start.context), "--max-num-seqs", str(TOGETHER), "--no-enable-prefix-caching"),
    ]


def vllm_environ(start: Start) -> dict[str, str]:
    """As many threads as the others have: unless told so it leaves one core to its server."""
    cores = f"0-{start.threads - 1}" if start.threads > 1 else "0"
    return {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def vllm_int8() -> Variant:
    """A checkpoint of int8 linears, a scale for each row, activations rounded as they come."""

    def convert(place: Place) -> list[Command]:
        return [place.python(HERE / "vllm_int8.py", place.checkpoint, place.out)]

    return Variant("vllm", "", convert)


def openvino(start: Start) -> Command:
    """The loop over its continuous batching."""
    program = [start.bin / "python", HERE / "openvino_serve.py", start.opened]
    return [*map(str, (*program, "--threads", start.threads, "--together", TOGETHER))]


ALONE, SCHEDULER = f"{NAME} run", f"{NAME} without HTTP"
SERVERS = {
    NAME: Server(ours),
    SCHEDULER: Server(without_http("scheduler"), http=False),
    ALONE: Server(without_http("session"), http=False, most=1),
    "llama.cpp Q8_0": Server(llama_server, "llama-server", llamacpp("q8_0", environment="llama-server")),
    "vLLM bfloat16": Server(vllm("bfloat16"), "vllm", environ=vllm_environ),
    "vLLM int8": Server(vllm("bfloat16"), "vllm", vllm_int8(), environ=vllm_environ),
    "OpenVINO int8": Server(openvino, "openvino", VARIANTS["OpenVINO int8"], http=False),
}
