"""Runs in the Python that an engine is installed in, never in this program's: does what it needs import there?

    importing.py MODULE...

The answer is a line of JSON on standard output, `{"imported": [name, ...]}`; where one does not, the script ends with
the error.
"""

import importlib
import json
import os
import sys


def main() -> None:
    """Import all, and say so; what they print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    print(json.dumps({"imported": sys.argv[1:]}), file=answers, flush=True)
    os._exit(0)  # threads that an engine started need not end first


if __name__ == "__main__":
    main()
