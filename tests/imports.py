"""What a statement imports: each is run in a fork of a Python that has imported little, and nothing of this program."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What nearly all of them import is imported once.
PROGRAM = """
import json, os, sys
import numpy, pydantic, yaml
for statement in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        exec(statement)
        print(json.dumps([statement, sorted(sys.modules)]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, statement
"""


def modules_after(statements: Iterable[str]) -> dict[str, set[str]]:
    """Statement -> names of all modules that are imported after it."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(list(statements))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return {statement: set(modules) for statement, modules in map(json.loads, done.stdout.splitlines())}
