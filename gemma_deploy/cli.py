"""The `gemma-deploy` program: finds a command by its file's name and turns errors into messages and exit codes.

Exit codes: 0 done, 1 the run or a gate failed, 2 recipe or usage, 130 interrupted. Imports a command's file only when
the command is asked for, so that `--help` needs neither torch nor ONNX Runtime.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from typing import Any

import click

from gemma_deploy.errors import DeployError

# One row per command: its file in gemma_deploy/commands/ and the line shown by `--help`.
COMMANDS = {
    "compile": "Compile a recipe into a verified artifact.",
    "calibrate": "Tokenize calibration samples and measure activation ranges.",
    "parity": "Compare an artifact with its reference; fails when a gate fails.",
    "eval": "Measure perplexity, KL and top-1, or accuracy on C-Eval.",
    "stage": "Make a directory that transformers loads as the patched model.",
    "split": "Cut a checkpoint into parts for several devices.",
    "run": "Generate text with an artifact.",
    "chat": "Talk with an artifact.",
    "bench": "Measure how fast an artifact is, and what it takes.",
    "inspect": "Show what is in an artifact or a checkpoint.",
    "verify": "Check every hash, graph and table of an artifact.",
}


# What the machine refuses a program that has no bug, with what to do about it; `main` explains what no stage has.
FULL = "free space there and run the same command again"
DENIED = "allow it, or name another place"
REFUSALS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EROFS: DENIED,
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "name another place: a part of this path is a file",
    errno.EIO: "the disk does not answer; look at the system's log",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
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
        return importlib.import_module(f"gemma_deploy.commands.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


EPILOG = """\b
Examples:
  gemma-deploy compile build_in/hf_gemma_int8.yaml
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
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("gemma_deploy").setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)


def main(argv: list[str] | None = None) -> Any:
    """Entry point: run, and end with a message and an exit code instead of a traceback."""
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
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.errno not in REFUSALS:
            raise  # a bug, and to be seen as one
        log.debug("where it happened", exc_info=True)
        step = f"{REFUSALS[error.errno]}; -v shows where it happened"
        place = str(error.filename) if error.filename else None
        click.echo(f"error: {DeployError(os.strerror(error.errno), where=place, next_step=step)}", err=True)
        return DeployError.exit_code


if __name__ == "__main__":
    sys.exit(main())
