"""Runs in the Python that llama-cpp-python is installed in, never in this program's: logits of every position.

    llama_reader.py FILE LENGTH THREADS

One request a line on standard input, one answer a line on standard output, JSON:
`{"run": ids, "out": file}` -> `{"rows": n}`: logits [n, V] float32 as an .npy file.
"""

import importlib
import json
import os
import sys

import numpy as np

CHUNK = 128  # tokens of a prompt in a step, so that most of them read their past from the cache


class Llama:
    """A file in llama.cpp."""

    def __init__(self, path: str, length: int, threads: int) -> None:
        self.library = importlib.import_module("llama_cpp")
        given = {"n_threads": threads, "n_threads_batch": threads} if threads else {}
        room = {"n_ctx": length + 1, "n_batch": CHUNK, "n_ubatch": CHUNK}
        self.model = self.library.Llama(path, verbose=False, **room, **given)

    def run(self, ids: list[int], out: str) -> int:
        """See the module."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.model.ctx), True)
        made = np.lib.format.open_memmap(out, "w+", np.float32, (len(ids), self.model.n_vocab()))
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            self._step(part, start)
            logits = self.library.llama_get_logits(self.model.ctx)
            made[start : start + len(part)] = np.ctypeslib.as_array(logits, shape=(len(part), made.shape[1]))
        made.flush()
        return len(ids)

    def _step(self, ids: list[int], position: int) -> None:
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position + at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, True
        code = self.library.llama_decode(self.model.ctx, batch)
        self.library.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library prints
    path, length, threads = sys.argv[1:]
    model = Llama(path, int(length), int(threads))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"rows": model.run(asked["run"], asked["out"])}), file=answers, flush=True)


if __name__ == "__main__":
    main()
