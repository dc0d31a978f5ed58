"""Processes that are killed at their n-th step on the disk: SIGKILL, before the step has done anything."""

import json
import signal
import subprocess
import sys
from contextlib import contextmanager

# Forks a child for each line of stdin, which works until its n-th step. What is imported before is imported once.
DRIVER = """
import importlib, json, os, pathlib, shutil, signal, sys
module, function = sys.argv[1].split(":")
work = getattr(importlib.import_module(module), function)
STEPS = [(os, name) for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "symlink")]
STEPS += [(pathlib.Path, "write_bytes"), (pathlib.Path, "write_text"), (shutil, "copyfile"), (shutil, "rmtree")]
for line in sys.stdin:
    at, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        left = [at]
        def dying(call):
            def wrapped(*args, **kwargs):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return call(*args, **kwargs)
            return wrapped
        os.fsync = lambda fd: None  # a step, but a kill needs no waiting for the disk
        for owner, name in STEPS:
            setattr(owner, name, dying(getattr(owner, name)))
        try:
            work(*arguments)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(3)
        print(at - left[0], flush=True)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        print(code, flush=True)
"""


@contextmanager
def killer(function):
    """(n, arguments) -> 0 when a process that calls `function(*arguments)` died at its n-th step, else how many it had.

    Args:
        function: "module:name", importable; the arguments are JSON values.
    """
    command = [sys.executable, "-c", DRIVER, function]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:

        def steps(at, *arguments):
            driver.stdin.write(json.dumps((at, arguments)) + "\n")
            driver.stdin.flush()
            code = int(driver.stdout.readline())
            assert code > 0 or code == -signal.SIGKILL
            return max(code, 0)

        yield steps
