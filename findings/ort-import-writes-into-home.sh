#!/usr/bin/env bash
# Importing onnxruntime on Linux starts a native thread and leaves a device id and a database under the home
# directory, before any session exists.
#
# version   onnxruntime 1.32.0, numpy 2.4.6; Linux x86-64.
# expected  `import onnxruntime` loads a library: a process has as many threads after it as before, so that it may
#           fork, and the home directory is as it was.
# seen      One thread more, which Python's threading module does not know, and files under
#           ~/.cache/Microsoft/DeveloperTools/.onnxruntime. disable_telemetry_events() comes too late for both;
#           ORT_DISABLE_TELEMETRY=1 before the import keeps thread and files away. A child that is forked after the
#           import may wait for ever for a lock that this thread held (seen in a test suite; no program for it here).
#
# Output:
#   As it is, more than before the import:
#   threads 1 Python's 0
#   file ~/.cache/Microsoft/DeveloperTools/.onnxruntime/deviceid
#   file ~/.cache/Microsoft/DeveloperTools/.onnxruntime/onnxruntime.db
#   With ORT_DISABLE_TELEMETRY=1:
#   threads 0 Python's 0
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    onnxruntime==1.32.0 numpy==2.4.6

cat >"$work/look.py" <<'PYTHON'
import os
import pathlib
import threading
import time

import numpy  # what onnxruntime imports itself, and which has a pool of its own

before = len(os.listdir("/proc/self/task"))
import onnxruntime

onnxruntime.disable_telemetry_events()
time.sleep(1)
print("threads", len(os.listdir("/proc/self/task")) - before, "Python's", threading.active_count() - 1)
home = pathlib.Path(os.environ["HOME"])
for name in ("deviceid", "onnxruntime.db"):
    for path in sorted(home.rglob(name)):
        print("file ~/" + str(path.relative_to(home)))
PYTHON

export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
unset ORT_DISABLE_TELEMETRY XDG_CACHE_HOME
mkdir "$work/home" "$work/quiet"
echo "As it is, more than before the import:"
HOME="$work/home" "$work/venv/bin/python" "$work/look.py" | tee "$work/seen"
echo "With ORT_DISABLE_TELEMETRY=1:"
HOME="$work/quiet" ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" "$work/look.py" | tee "$work/quiet.txt"
if ! grep -q "threads [1-9]" "$work/seen" || [ "$(grep -c "^file" "$work/seen")" -lt 2 ] ||
    grep -q "threads [1-9]\|^file" "$work/quiet.txt"; then
    echo "CHANGED: the import leaves the process or the home directory alone, or the variable does nothing" >&2
    exit 1
fi
