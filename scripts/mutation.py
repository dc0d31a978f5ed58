"""Mutation testing: break the rules one place at a time, and see whether the tests notice.

    pip install cosmic-ray==8.7.0
    python scripts/mutation.py                                       # every mutant of every module; an hour or two
    python scripts/mutation.py --sample 60 gemma_deploy/schemes.py   # sixty, evenly spaced over the module
    python scripts/mutation.py --only survivors.txt                  # those of an earlier run that survived

Mutants are those of cosmic-ray's operators that need no setting, except in annotations, which nothing reads, and of
`==` for `is`. Each runs in a forked child that has the libraries loaded already, which makes one second of four; files
stay as they are. One line for each survivor, which `--only` reads back, then the score. docs/testing.md says what was
found.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parent.parent
# Module -> tests that judge it: seconds, no model. The first to fail ends the run, so what fails soonest stands first.
RECIPE = ("tests/recipe/test_recipe.py", "tests/recipe/test_rules.py", "tests/recipe/test_guesses.py")
PARTITION = ("tests/partition",)
TESTS: dict[str, tuple[str, ...]] = {
    "gemma_deploy/schemes.py": ("tests/test_schemes.py", "tests/params/test_plan.py"),
    "gemma_deploy/partition/mapper.py": PARTITION,
    "gemma_deploy/partition/parts.py": PARTITION,
    "gemma_deploy/partition/ranks.py": PARTITION,
    "gemma_deploy/partition/spans.py": PARTITION,
    "gemma_deploy/recipe/rules.py": RECIPE,
    "gemma_deploy/recipe/spec.py": RECIPE,
    "gemma_deploy/params/plan.py": ("tests/params/test_plan.py", "tests/params/test_plan_values.py"),
    "gemma_deploy/parity/gates.py": ("tests/parity/test_gates.py",),
}
# Slow, or in a process of its own, which has no mutant.
LEFT_OUT = "not transformers and not import_torch and not bounded"
LIBRARIES = (
    "numpy",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "pydantic",
    "safetensors",
    "yaml",
    "rich",
    "click",
)
# `is` is `==` for None, for small numbers and for the texts of one program.
IDENTITY = ("_Eq_Is", "_Is_Eq", "_NotEq_IsNot", "_IsNot_NotEq")
SECONDS, BYTES = 60, 6 << 30  # what one mutant may take: a loop that never ends counts as noticed
SURVIVED, KILLED, NO_PYTHON = "survived", "killed", "not Python"


@dataclass(frozen=True)
class Mutant:
    """One change of one module.

    Args:
        module: its file, from the root of the project.
        operator, occurrence: cosmic-ray's name of the change, and which place.
        line: of the file.
    """

    module: str
    operator: str
    occurrence: int
    line: int

    def __str__(self) -> str:
        return f"{self.module} {self.operator} {self.occurrence}"

    def code(self) -> str:
        """The module's text with the change."""
        return str(mutate_code((ROOT / self.module).read_text(), get_operator(self.operator)(), self.occurrence))

    def change(self) -> str:
        """The changed lines, for people."""
        before, after = (ROOT / self.module).read_text().splitlines(), self.code().splitlines()
        lines = difflib.unified_diff(before, after, lineterm="", n=0)
        return " => ".join(line[1:].strip() for line in list(lines)[2:] if line[0] in "+-")


def mutants_of(module: str) -> list[Mutant]:
    """Every mutant of a module, from its top to its end."""
    text = (ROOT / module).read_text()
    tree, unread = get_ast(text), set(_annotated(ast.parse(text)))
    found = []
    for name in operator_names():
        operator = get_operator(name)
        if operator.arguments() or name.endswith(IDENTITY):
            continue
        places = (place for node in ast_nodes(tree) for place in operator().mutation_positions(node))
        for occurrence, (start, _) in enumerate(places):
            if start not in unread:
                found.append((start, Mutant(module, name, occurrence, start[0])))
    return [mutant for _, mutant in sorted(found, key=lambda pair: (pair[0], pair[1].operator))]


def _annotated(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """(line, column) of everything inside annotations."""
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.expr) and part.end_lineno is not None and part.end_col_offset is not None:
                assert part.lineno == part.end_lineno, "an annotation over several lines"
                yield from ((part.lineno, column) for column in range(part.col_offset, part.end_col_offset))


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the mutant in the place of its module."""

    def __init__(self, module: str, code: CodeType) -> None:
        self.file, self.code = str(ROOT / module), code
        self.name = module.removesuffix(".py").replace("/", ".")

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Of the one module that is changed."""
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        """Run the mutant's code."""
        module.__file__ = self.file
        exec(self.code, module.__dict__)


def outcome(mutant: Mutant | None, module: str) -> str:
    """Run a module's tests on a mutant, or on the module as it is."""
    finders = []
    if mutant is not None:
        try:
            finders = [Changed(module, compile(mutant.code(), module, "exec"))]
        except SyntaxError:
            return NO_PYTHON
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
        sys.meta_path[:0] = finders
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if finders:
            os.dup2(nowhere, 1), os.dup2(nowhere, 2)
        there = [name for name in TESTS[module] if (ROOT / name).exists()]
        options = ["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", LEFT_OUT]
        try:
            code = int(pytest.main([*options, "-m", "not slow and not real", *there]))
        except BaseException:  # also what a mutant does to pytest itself
            code = 1
        os._exit(code)
    return KILLED if os.waitpid(child, 0)[1] else SURVIVED


def read_only(path: str) -> list[Mutant]:
    """Mutants of the lines that an earlier run printed."""
    wanted = {" ".join(line.split()[1:4]) for line in Path(path).read_text().splitlines() if line.startswith(SURVIVED)}
    return [mutant for module in TESTS for mutant in mutants_of(module) if str(mutant) in wanted]


def main() -> None:
    """Print survivors and the score of each module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="files from the root of the project")
    parser.add_argument("--sample", type=int, help="mutants of each module, evenly spaced")
    parser.add_argument("--between", action="store_true", help="those halfway between the ones of --sample")
    parser.add_argument("--only", help="output of an earlier run: its survivors")
    parser.add_argument("--count", action="store_true", help="count the mutants, and run nothing")
    given = parser.parse_args()
    os.chdir(ROOT)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, str(ROOT))
    chosen = read_only(given.only) if given.only else [one for name in given.modules for one in mutants_of(name)]
    for name in LIBRARIES if not given.count else ():
        importlib.import_module(name)
    for module in dict.fromkeys(one.module for one in chosen):
        mine = [one for one in chosen if one.module == module]
        count = min(given.sample or len(mine), len(mine))
        sample = [mine[(2 * i + given.between) * len(mine) // (2 * count)] for i in range(count)]
        if not given.count and outcome(None, module) == KILLED:
            sys.exit(f"{module}: its tests fail without a mutant already")
        score: Counter[str] = Counter()
        for mutant in sample if not given.count else ():
            result = outcome(mutant, module)
            score[result] += 1
            if result == SURVIVED:
                print(SURVIVED, mutant, f"line {mutant.line}: {mutant.change()}", flush=True)
        print(f"score {module}: {len(mine)} mutants, {count} run, {dict(score)}", flush=True)


if __name__ == "__main__":
    main()
