#!/usr/bin/env bash
# click ends the whole process, silently and with 1, when a reader of its output goes, in standalone_mode=False as well.
#
# version   click 8.5.1; Python 3.11 on Linux.
# expected  "If this is set to `False` they will be propagated to the caller" (main's standalone_mode): BrokenPipeError
#           reaches whoever called command.main(standalone_mode=False), as every other OSError does.
# seen      EPIPE alone is caught in both modes: sys.stdout and sys.stderr are replaced, and sys.exit(1) is called. An
#           `except Exception` of the caller sees nothing, nothing is said, and the work behind the first line that
#           nobody read is left undone: `program | head -1` is a program that stops. Its 1 is also what a program that
#           reports failures by 1 would have said of a check that passed.
#
# Output:
#   reader there: command done, caller saw no exception, exit code 0
#   reader gone:  command left undone, caller saw SystemExit, exit code 1, standard error ''
#   another OSError: caller saw IsADirectoryError
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check click==8.5.1

cd "$work"
cat > program.py <<'PYTHON'
import os
import sys

import click


@click.command()
@click.option("--directory", is_flag=True)
def command(directory):
    if directory:
        open(".", "w")
    click.echo("working")
    sys.stdout.flush()
    open("done", "w").close()


seen = "no exception"
try:
    command.main(standalone_mode=False)
except Exception as error:
    seen = type(error).__name__
except BaseException as error:
    seen = type(error).__name__
    raise
finally:
    with open("seen", "w") as file:
        file.write(seen)
PYTHON
HOME="$work" "$work/venv/bin/python" - <<'PYTHON'
import os
import subprocess
import sys


def run(*options, stdout):
    for name in ("done", "seen"):
        if os.path.exists(name):
            os.unlink(name)
    ended = subprocess.run([sys.executable, "program.py", *options], stdout=stdout, stderr=subprocess.PIPE, text=True)
    done = "done" if os.path.exists("done") else "left undone"
    return done, open("seen").read(), ended.returncode, ended.stderr


there = run(stdout=subprocess.DEVNULL)
reader, writer = os.pipe()
os.close(reader)
gone = run(stdout=writer)
other = run("--directory", stdout=subprocess.DEVNULL)
print(f"reader there: command {there[0]}, caller saw {there[1]}, exit code {there[2]}")
print(f"reader gone:  command {gone[0]}, caller saw {gone[1]}, exit code {gone[2]}, standard error {gone[3]!r}")
print(f"another OSError: caller saw {other[1]}")
if there[:3] != ("done", "no exception", 0) or gone != ("left undone", "SystemExit", 1, "") or (
    other[1] != "IsADirectoryError"
):
    sys.exit("CHANGED: click treats a closed pipe otherwise")
PYTHON
