"""The program with something added to it: a copy, what was touched in it, and its commands."""

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = ("gemma_deploy", "source_code")


def copy_program(root: Path) -> Path:
    """Everything that a command reads."""
    for name in (*CODE, "calib", "build_in"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def touched(root: Path) -> list[str]:
    """Files and folders of the copy that are new, gone or changed."""
    return sorted(f"{name}/{below}" for name in CODE for below in _differing(ROOT / name, root / name))


def _differing(one: Path, other: Path) -> list[str]:
    compared = filecmp.dircmp(one, other, ignore=["__pycache__"])
    found = [*compared.left_only, *compared.right_only, *compared.diff_files]
    for name in compared.common_dirs:
        found += [f"{name}/{below}" for below in _differing(one / name, other / name)]
    return found


def changed_lines(root: Path, file: str) -> int:
    """Lines of a file of the copy that the program does not have."""
    return len(set((root / file).read_text().splitlines()) - set((ROOT / file).read_text().splitlines()))


def command_of(root: Path, work: Path):
    """Words -> the finished process of the copy's command, run in `work`."""
    code = "import sys; from gemma_deploy.cli import main; sys.exit(main(sys.argv[1:]))"

    def command(*words):
        return subprocess.run(
            [sys.executable, "-P", "-c", code, *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(root)},
            cwd=work,
            capture_output=True,
            text=True,
        )

    return command
