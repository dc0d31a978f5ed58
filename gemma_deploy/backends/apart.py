"""An engine in a Python of its own as a source of logits: engines want other versions of packages than this program."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from gemma_deploy.child import OtherPython
from gemma_deploy.errors import DeployError, UsageError

LAST_LINES = 12
PROBE = Path(__file__).parent / "probe" / "importing.py"


@dataclass(frozen=True)
class Engine:
    """What runs there.

    Args:
        name: for people; backend: `backend.type` of its artifacts; module: what is imported; package: to install.
        variable: of the environment, names the interpreter; script: what the interpreter runs.
        variables: of the environment of the script; beside: modules that the script imports besides the first.
    """

    name: str
    backend: str
    module: str
    package: str
    variable: str
    script: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    beside: Sequence[str] = ()

    def check(self) -> None:
        """See that all that is needed imports in the interpreter, before work that is for nothing without it.

        Raises:
            UsageError: there is no interpreter, or something in it does not work.
        """
        python, modules = self.python(), (self.module, *self.beside)
        problems = _import_problems(python, modules, frozenset(self.variables.items()))
        if problems:
            raise UsageError(
                f"{self.name} does not import in the Python that it is to run in",
                where=python,
                expected=f"a Python that imports {', '.join(modules)}",
                problems=problems,
                next_step=f"pip install {self.package} in an environment of its own, and name its python in "
                f"{self.variable}; or compile with --no-parity, which proves nothing",
            )

    def python(self) -> str:
        """The interpreter that has the engine.

        Raises:
            UsageError: there is none.
        """
        named, example = os.environ.get(self.variable), f"~/{self.backend}"
        if named:
            found = shutil.which(named)
            if found is None:
                raise UsageError(
                    f"{self.variable} names no program",
                    where=named,
                    expected=f"the python of an environment that {self.name} is installed in",
                    next_step=f"export {self.variable}={example}/bin/python",
                )
            return found
        if importlib.util.find_spec(self.module) is not None:
            return sys.executable
        raise UsageError(
            f"{self.name} is not installed here, and artifacts of backend.type {self.backend} run and are proven in it",
            expected=f"an environment of its own, and {self.variable} that names its python",
            next_step=f"python -m venv {example} && {example}/bin/pip install {self.package} && export "
            f"{self.variable}={example}/bin/python, or compile with --no-parity, which proves nothing",
        )


class Conversation:
    """The script, started when it is first asked, and a folder for arrays.

    Args:
        engine: what it is; source: for messages; where: the artifact.
        arguments: of the script.
    """

    def __init__(self, engine: Engine, source: str, where: Path, *arguments: str) -> None:
        self._engine, self._source, self._where, self._arguments = engine, source, where, arguments
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._child: OtherPython | None = None

    @property
    def folder(self) -> Path:
        """For arrays; it ends with the conversation."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix=f"gemma-deploy-{self._engine.backend}-")
        return Path(self._folder.name)

    def ask(self, request: dict[str, object]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            UsageError: the engine is not there. DeployError: the script ended.
        """
        if self._child is None:
            with open(self.folder / "log", "wb") as log:
                self._child = OtherPython(
                    self._engine.python(), str(self._engine.script), *self._arguments,
                    variables=self._engine.variables,
                    log=log,
                )  # fmt: skip
            self._answer(self._child, None)
        return self._answer(self._child, request)

    def close(self) -> None:
        """End what was started."""
        if self._child is not None:
            self._child.stop()
            self._child = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _answer(self, child: OtherPython, request: dict[str, object] | None) -> dict[str, Any]:
        try:
            return child.ask(request)
        except EOFError:
            said = _last_lines((self.folder / "log").read_bytes())
            self.close()
            raise DeployError(
                f"{self._source} ended before it answered",
                where=str(self._where),
                problems=said,
                next_step=f'read its last lines above; `-c "import {self._engine.module}"` in its Python has to work',
            ) from None


@cache  # seconds, and `compile` asks before it begins and before it proves
def _import_problems(python: str, modules: Sequence[str], variables: frozenset[tuple[str, str]]) -> list[str]:
    """What an interpreter says last where a module does not import in it; nothing where all do."""
    with tempfile.TemporaryFile() as log:
        probe = OtherPython(python, str(PROBE), *modules, variables=dict(variables), log=log)
        try:
            probe.ask()
        except EOFError as error:
            log.seek(0)
            return _last_lines(log.read()) or [str(error)]
        finally:
            probe.stop()
    return []


def _last_lines(log: bytes) -> list[str]:
    return log.decode(errors="replace").strip().splitlines()[-LAST_LINES:]
