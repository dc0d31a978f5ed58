"""Stands in for a script of another Python (gemma_deploy/backends/asked.py): `engine_apart.py LOG V KEEPS DIES`.

The most probable next token is the sum of all tokens, modulo V. What was asked is written into LOG. A sequence is set
back to nothing where KEEPS is 0. A text that holds the token DIES ends the process.
"""

import json
import sys

import numpy as np


def main() -> None:
    log, size, keeps, dies = sys.argv[1], *map(int, sys.argv[2:])
    known, files = {}, {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        with open(log, "a") as file:
            file.write(line)
        answer = {}
        if "peak" in asked:
            answer = {"bytes": 12345}
        elif "begin" in asked:
            known[asked["begin"]] = []
            files[asked["begin"]] = np.memmap(asked["out"], np.float32, "w+", shape=(8, size))
            answer = {"rows": 8}
        elif "end" in asked:
            del known[asked["end"]]
        else:
            number, length = asked["read"], asked["length"]
            if length < len(known[number]) and not keeps:
                known[number], answer = [], {"kept": 0}
            if length == answer.get("kept", length):
                known[number], wanted = [*known[number][:length], *asked["ids"]], asked["wanted"]
                if dies in asked["ids"]:
                    sys.exit("out of memory, says the stand-in")
                for row in range(wanted):
                    seen = known[number][: len(known[number]) - wanted + 1 + row]
                    files[number][row] = 0
                    files[number][row, sum(seen) % size] = 1
                answer = {"kept": length}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
