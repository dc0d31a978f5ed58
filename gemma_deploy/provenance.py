"""What a result depends on, as one key: inputs, the keys of the stages it reads, its own code, its own libraries.

Code and libraries are not listed by hand, which is how such lists go stale: they follow from the imports of the modules
that do the work. A comment in a command, or a new version of a library that a stage does not use, changes no key of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gemma_deploy import paths
from gemma_deploy.names import CONFIG

PACKAGE = "gemma_deploy"
PATCHED = f"{PACKAGE}.patched"  # imports source_code/, which lies beside the package
# Say how errors, clocks, memory, children and temporary files are handled, or draw; no result depends on that.
_HANDLING = ("errors", "machine", "progress", "child", "reading", "paths", "workdir", "writing", "calibration.picture")
# Counts where a checkpoint is a GGUF file, in `Checkpoint.weights_fingerprint`, and for no other.
_ONE_FORMAT = ("checkpoint.gguf_reader",)
NEUTRAL = frozenset(f"{PACKAGE}.{name}" for name in (*_HANDLING, *_ONE_FORMAT))
DISTRIBUTIONS = {"yaml": "PyYAML", "onnxruntime_genai": "onnxruntime-genai", "PIL": "pillow"}
_FROM = re.compile(r"^[ \t]*from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]+)", re.MULTILINE)
_WHOLE = re.compile(r"^[ \t]*import[ \t]+([^\n#]+)", re.MULTILINE)
_OFFERED = re.compile(r'^[ \t]+"(\w+)": "([\w.]+)",$', re.MULTILINE)  # of the table of offering.py
_TYPES_ONLY = re.compile(r"^if TYPE_CHECKING:\n(?:[ \t]+[^\n]*\n|\n)+", re.MULTILINE)  # never run


@dataclass(frozen=True)
class Code:
    """Everything that runs when some modules do their work.

    Args:
        modules: of this package, dotted names, in order; files of source_code/ among them where they are imported.
        libraries: names that are imported and belong to neither this package nor Python.
    """

    modules: tuple[str, ...]
    libraries: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Over the text of every module."""
        digest = hashlib.sha256()
        for name in self.modules:
            digest.update(name.encode() + b"\0" + _bytes_of(name) + b"\0")
        return digest.hexdigest()

    @property
    def versions(self) -> dict[str, str]:
        """Library -> its version."""
        return {name: version_of(DISTRIBUTIONS.get(name, name)) for name in self.libraries}


def stage_key(name: str, *, code: Sequence[str], inputs: Any, reads: Mapping[str, str] | None = None) -> str:
    """One sha256 for the result of a stage.

    Args:
        name: of the stage.
        code: modules that do the work; what they import counts as well.
        inputs: anything that JSON can hold: recipe keys, fingerprints of files, choices.
        reads: keys of the stages whose results it takes, by name.
    """
    found = code_of(tuple(code))
    parts = [name, inputs, dict(reads or {}), found.sha256, found.versions]
    return digest(parts)


def digest(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def version_of(distribution: str) -> str:
    """The version of an installed distribution; "not installed" where it is not there."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


@cache
def code_of(roots: tuple[str, ...]) -> Code:
    """The modules that `roots` import, directly or not, and the libraries they name.

    Raises:
        LookupError: a root is no module of this package.
    """
    found: dict[str, None] = {}
    libraries: set[str] = set()
    seen: set[str] = set()
    waiting = [*roots, *(parent for root in roots for parent in _parents(root))]
    for root in roots:
        if _file_of(root) is None:
            raise LookupError(root)
    while waiting:
        name = waiting.pop()
        if name in found or (name in NEUTRAL and name not in roots):
            continue
        found[name] = None
        for imported in _imports(name):
            if imported.split(".")[0] in (PACKAGE, "source_code"):
                new = {imported, *_parents(imported)} - seen
                seen |= new
                waiting += [each for each in new if _file_of(each) is not None]
            elif imported.split(".")[0] not in sys.stdlib_module_names:
                libraries.add(imported.split(".")[0])
        if name == PATCHED:
            waiting += [f"source_code.{file.stem}" for file in paths.source_code_dir().glob("*.py")]
    return Code(tuple(sorted(found)), tuple(sorted(libraries)))


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(2, len(parts))]


def _file_of(name: str) -> Path | None:
    """The file of a module of this package, or of source_code/."""
    first, _, rest = name.partition(".")
    if first == "source_code":
        file = paths.source_code_dir() / f"{rest}.py"
        return file if file.is_file() else None
    if first != PACKAGE:
        return None
    base = paths.PACKAGE.joinpath(*rest.split(".")) if rest else paths.PACKAGE
    candidates = (base.with_suffix(".py"), base / "__init__.py") if rest else (base / "__init__.py",)
    return next((file for file in candidates if file.is_file()), None)


@cache
def _bytes_of(name: str) -> bytes:
    file = _file_of(name)
    assert file is not None, name
    text = file.read_bytes()
    if name == PATCHED:  # and what says which of its files belong to which model
        text += (paths.source_code_dir() / CONFIG).read_bytes()
    return text


def _imports(name: str) -> Iterator[str]:
    """Dotted names that a module imports, those inside functions included; relative ones are those of source_code/."""
    text = _TYPES_ONLY.sub("", _bytes_of(name).decode("utf-8"))
    for match in _WHOLE.finditer(text):
        yield from (part.split(" as ")[0].strip() for part in match[1].split(","))
    for match in _FROM.finditer(text):
        where, names = match[1], re.sub(r"#[^\n]*", "", match[2]).strip("()")
        if where.startswith("."):
            yield f"source_code.{where.lstrip('.')}"
            continue
        yield where
        if where.split(".")[0] == PACKAGE:
            offered = {} if where == name else _offered(where)  # it may show in its docstring how to ask it
            parts = (part.split(" as ")[0].strip() for part in names.split(",") if part.strip())
            yield from (offered.get(part, f"{where}.{part}") for part in parts)


def _offered(package: str) -> dict[str, str]:
    """Where the names are that a package imports when they are asked for."""
    text = "" if _file_of(package) is None else _bytes_of(package).decode("utf-8")
    return dict(_OFFERED.findall(text.partition("offering(")[2]))
