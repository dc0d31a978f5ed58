"""Errors a user can cause or meet, and the exit code each one ends the program with.

DeployError                 1  the run failed
|-- CheckpointError         1  weights or config are damaged, missing, or of another family
|-- ExportError             1  the patched model could not become a graph
|-- ParamsError             1  the parameter file could not be written or resumed
|-- CalibrationError        1  a data set is unreadable, empty or too short
|-- ArtifactError           1  an artifact is damaged, incomplete or of another version
|   `-- NoArtifactError     2  there is nothing where an artifact was asked for
|-- PreflightError          1  this machine lacks memory, disk or a file for the job
|-- GateError               1  the numbers are wrong: parity left its tolerance
`-- UsageError              2  what was asked for makes no sense
|-- RecipeError         2  the recipe is wrong (all offenders are listed)
`-- NotBuiltError       2  valid, but this version does not do it
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# How libraries say that the system gave them no memory, in errors of no kind of their own.
NO_MEMORY = re.compile(
    r"can.t allocate memory|cannot allocate memory|bad_alloc|failed to allocate memory|can't start new thread"
    r"|failed to map segment",
    re.IGNORECASE,
)
# A file may be called so; in a message it would break the line, or tell the terminal something.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")


class DeployError(Exception):
    """A failure explained to the user: what, where, what was expected, and what to do next.

    Args:
        what: one sentence saying what is wrong.
        where: file, key, line or tensor the sentence is about.
        expected: what would have been right.
        next_step: what the user can do now.
        problems: all offenders, one line each, when there is more than one.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        next_step: str | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        self.what, self.where, self.expected = what, where, expected
        self.next_step, self.problems = next_step, tuple(problems)
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """Whole across processes; `args` holds the text alone."""
        return _rebuilt, (type(self), self.__dict__.copy())

    def __str__(self) -> str:
        where = plain(self.where or "")
        lines = [f"{where}: {self.what}" if where else self.what]
        lines += [f"  - {problem}" for problem in self.problems]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.next_step:
            lines.append(f"  next: {self.next_step}")
        return "\n".join(lines)


def plain(text: str) -> str:
    """A text of somebody else's on one line: control characters are spelled out."""
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def _rebuilt(kind: type[DeployError], fields: dict[str, Any]) -> DeployError:
    return kind(**fields)


class CheckpointError(DeployError):
    """Weights or config are damaged, missing, or of another model family."""


class ExportError(DeployError):
    """The patched model could not be turned into a graph."""


class ParamsError(DeployError):
    """The parameter file could not be written or resumed."""


class CalibrationError(DeployError):
    """A calibration data set is unreadable, empty or too short."""


class ArtifactError(DeployError):
    """An artifact is damaged, incomplete or was written by another version."""


START_AGAIN = (
    "put the artifact in order (`gemma-deploy verify`) and start again; to replace one that is in use, make the new "
    "one in another directory and rename it, as `gemma-deploy compile --force` does"
)


class ChangedError(ArtifactError):
    """An artifact's weights were written to while they were in use: nothing more can be computed with them."""


class PreflightError(DeployError):
    """This machine lacks memory, disk or a file for the job."""


class BusyError(DeployError):
    """Another process is writing the same directory."""


class GateError(DeployError):
    """Parity left its tolerance: the artifact does not compute the model."""


class UsageError(DeployError):
    """The request makes no sense."""

    exit_code = 2


class NoArtifactError(ArtifactError, UsageError):
    """There is nothing at the path of an artifact."""


class RecipeError(UsageError):
    """The recipe has keys or values that are refused: each with its line, and what was expected."""


class NotBuiltError(UsageError):
    """A valid request this version does not carry out."""
