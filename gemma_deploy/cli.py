"""The `gemma-deploy` program: finds a command by its file's name and turns errors into messages and exit codes.

Exit codes: 0 done, 1 the run or a gate failed, 2 recipe or usage, 130 interrupted. Imports a command's file only when
the command is asked for, so that `--help` needs neither torch nor ONNX Runtime.
"""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import sys
from typing import Any, TextIO

import click

from gemma_deploy.errors import NO_MEMORY, DeployError
from gemma_deploy.extras import extra_of, missing

# One row per command: its file in gemma_deploy/commands/ and the line shown by `--help`.
COMMANDS = {
    "recipes": "List the built-in recipes: what each is for, what it needs.",
    "plan": "Say what fits on a device, how fast, and where to start.",
    "compile": "Compile a recipe into a verified artifact.",
    "finetune": "Train a LoRA adapter or a whole model on a file of examples.",
    "calibrate": "Tokenize calibration samples and measure activation ranges.",
    "parity": "Compare an artifact with its reference, and judge by gates.",
    "eval": "Measure perplexity, KL and top-1, or accuracy on C-Eval.",
    "merge": "Write a checkpoint with an adapter added.",
    "stage": "Make a directory that transformers loads as patched.",
    "split": "Cut a checkpoint into parts for several devices.",
    "adapter": "Keep a LoRA adapter in an artifact, to be loaded beside it.",
    "run": "Generate text with an artifact.",
    "chat": "Talk with an artifact.",
    "serve": "Answer requests over HTTP as OpenAI's servers do.",
    "serve-command": "Print the command that serves an artifact, such as vLLM's.",
    "embed": "Make vectors of texts with an artifact of an encoder.",
    "webui": "Serve a web page to chat with the models of a server.",
    "bench": "Measure how fast an artifact is, and what it takes.",
    "inspect": "Show what is in an artifact or a checkpoint.",
    "verify": "Check every hash, graph and table of an artifact.",
}


# Commands that have nothing to do when nobody reads them any more; the others have work, and a verdict.
WRITERS = ("run", "chat")

# What the machine refuses a program that has no bug, with what to do about it; `main` explains what no stage has.
FULL = "free space there and run the same command again"
DENIED = "allow it, or name another place"
NAME = "name another place"
SILENT = "the disk does not answer; look at the system's log"
REFUSALS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or name a place on a disk that takes larger files",
    errno.ENAMETOOLONG: "name another place: a part of a path has at most 255 bytes, a path 4096",
    errno.ELOOP: "name another place: the links of this path lead in a circle",
    errno.EMLINK: NAME,
    errno.EBUSY: "wait until the other program has done with it, and run the same command again",
    errno.ETXTBSY: "wait until the other program has done with it, and run the same command again",
    errno.ENXIO: "name a file: this is a device or a socket",
    errno.ENODEV: "name a file: this is a device or a socket",
    errno.EROFS: DENIED,
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "name another place: a part of this path is a file",
    errno.EIO: SILENT,
    errno.ESTALE: SILENT,
    errno.ETIMEDOUT: SILENT,
    errno.ENOTCONN: SILENT,
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the system has no more open files to give",
    errno.EAGAIN: "raise the limit of processes (ulimit -u)",
}
LONG = "%(levelname)s %(name)s: %(message)s"  # of log lines with -v
VANISHED = "see that nothing removes files while the program works, and run the same command again"
log = logging.getLogger("gemma_deploy.cli")  # __name__ is __main__ under python -m


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import `gemma_deploy.commands.<name>` and take its `command`."""
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"gemma_deploy.commands.{cmd_name.replace('-', '_')}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """See click; called once, before anything is written."""
        name, command, rest = super().resolve_command(ctx, args)
        if name not in WRITERS:
            for stream in ("stdout", "stderr"):
                _outlive_the_reader(stream)
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """See click, which would end with 1 where nobody reads any more."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            if ctx.invoked_subcommand in WRITERS:
                raise click.exceptions.Exit(0) from None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


EPILOG = """\b
Examples:
  gemma-deploy recipes
  gemma-deploy compile cpu-int8
  gemma-deploy calibrate --dataset c4
  gemma-deploy parity --backend onnxruntime
  gemma-deploy run workspace/NAME -p "The list"
"""


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Show what each pass and stage does.")
@click.version_option(package_name="gemma-deploy")
def cli(verbose: bool) -> None:
    """Take a Gemma checkpoint to an accelerator artifact that is proven to compute the same model."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what it has to say about old config keys is handled here
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else importing it writes a database into the user's home
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(LONG) if verbose else _ForPeople())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("gemma_deploy").setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)


class _ForPeople(logging.Formatter):
    """`note: ...` and `warning: ...`, without the module that says so."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging."""
        word = "note" if record.levelno <= logging.INFO else record.levelname.lower()
        return f"{word}: {super().format(record)}"


def main(argv: list[str] | None = None) -> Any:
    """Entry point: run, and end with a message and an exit code instead of a traceback."""
    _prepare_streams()
    try:
        code = _run(argv)
        _flush(sys.stdout)
    except BrokenPipeError:
        _discard(sys.stdout)
        return 0
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        refusal = _refusal(error)
        if refusal is None:
            raise  # a bug, and to be seen as one
        log.debug("where it happened", exc_info=True)
        click.echo(f"error: {refusal}", err=True)
        _discard(sys.stdout)
        return refusal.exit_code
    return code


def _run(argv: list[str] | None) -> Any:
    """Run a command; its messages and exit codes."""
    try:
        return cli.main(args=argv, standalone_mode=False) or 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to continue where it stopped", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except DeployError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code


def _is_nowhere() -> bool:
    """Whether the current directory was deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _refusal(error: Exception) -> DeployError | None:
    """What the machine refused or has not installed, or None for an error that may be a bug."""
    if isinstance(error, ModuleNotFoundError) and error.name and (extra := extra_of(error.name)):
        return missing([extra], [error.name], "this")
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM or NO_MEMORY.search(str(error)):
        said = " ".join(str(error).split())[:200]
        return DeployError(
            "the system gives no more memory" + (f": {said}" if said else ""),
            next_step="close other programs or raise the limit (ulimit -v), and run the same command again; "
            "-v shows where it happened",
        )
    if not isinstance(error, OSError) or number is None:
        return None
    if number == errno.ENOENT and _is_nowhere():
        return DeployError("the current directory was deleted", next_step="go to one that is there (cd)")
    if number == errno.ENOENT and "temporary directory" in str(error):
        return DeployError(str(error.strerror), next_step="set TMPDIR to a directory that you may write to")
    step = VANISHED if number == errno.ENOENT and error.filename else REFUSALS.get(number)
    if step is None:
        return None
    place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else None
    return DeployError(os.strerror(number), where=place, next_step=f"{step}; -v shows where it happened")


def _prepare_streams() -> None:
    """Closed ones lead to the null device, and letters that an encoding lacks are escaped.

    A file that is opened while descriptor 1 or 2 is free would get that number, and what libraries print as well.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(descriptor)
            except OSError:
                opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
                os.set_inheritable(opened, True)
                setattr(sys, name, os.fdopen(opened, "w" if descriptor else "r", encoding="utf-8"))
        elif descriptor and isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


class _Pipe(io.FileIO):
    """An output whose reader may go: what is written after that goes to the null device."""

    def write(self, data: Any, /) -> int:
        """See io."""
        try:
            return super().write(data)
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def _outlive_the_reader(name: str) -> None:
    """`compile | head -1` is to end with an artifact, and `parity | head -1` with the gate's exit code."""
    stream = getattr(sys, name)
    if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
        return
    stream.flush()
    patient = io.TextIOWrapper(
        io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    setattr(sys, name, patient)


def _flush(stream: TextIO | None) -> None:
    """Write what is still waiting: at the end of the process it is too late to say that it cannot be."""
    if stream is not None and not stream.closed:
        stream.flush()


def _discard(stream: TextIO | None) -> None:
    """Let what cannot be written go to the null device, or the interpreter complains again when it ends."""
    try:
        _flush(stream)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)


if __name__ == "__main__":
    sys.exit(main())
