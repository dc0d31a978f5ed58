"""Runs in the Python that llama-cpp-python is installed in, never in this program's: logits of a file for llama.cpp.

    llama_reader.py FILE THREADS

One request a line on standard input, one answer a line on standard output, JSON. Logits [n, V] are float32, in a file.

`{"run": ids, "out": file}`    of every position of a text, as an .npy file -> `{"rows": n}`
`{"begin": number, "room": n, "out": file}`    a sequence of n tokens at most, whose logits go into the file, raw; it
    is made with the room of `rows` rows -> `{"begun": number, "rows": rows}`
`{"read": number, "length": n, "ids": ids, "wanted": w}`    forget what is behind n tokens of it, read these, give the
    logits of the last w -> `{"kept": k}`: n, and logits are there; less where it had to forget more, and read nothing
`{"end": number}`    forget it -> `{}`
`{"peak": true}`    -> `{"bytes": n}`, the peak RSS of this process
"""

import importlib
import json
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

CHUNK = 128  # tokens of a text in a step of `run`, so that most of them read their past from the cache
BATCH = 512  # tokens of a prompt in a step, as llama.cpp has it by default
ROWS = 8  # logits that one answer has at most


class Context:
    """One sequence: keys and values of llama.cpp.

    Args:
        owner: of the model; room: tokens there may be; step: tokens that are computed together at most.
    """

    def __init__(self, owner: "Llama", room: int, step: int) -> None:
        self.library, self.owner, self.room = owner.library, owner, room
        params = self.library.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = room, step, step
        params.n_threads = params.n_threads_batch = owner.threads
        params.flash_attn_type = self.library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.step = step
        self.context = self.library.llama_init_from_model(owner.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {room} tokens")

    def keep(self, length: int) -> int:
        """Forget what is behind so many tokens: what was kept, which may be less where a window has moved on."""
        memory = self.library.llama_get_memory(self.context)
        if length and self.library.llama_memory_seq_rm(memory, 0, length, -1):
            return length
        self.library.llama_memory_clear(memory, True)
        return 0

    def read(self, ids: list[int], position: int, wanted: int) -> Iterator[np.ndarray]:
        """Read tokens; logits of each of the last `wanted`, as a step gives them: [n, V] each, until the next."""
        first = len(ids) - wanted
        for start in range(0, len(ids), self.step):
            part = ids[start : start + self.step]
            asked = self._compute(part, position + start, max(0, min(first - start, len(part))))
            if asked:
                logits = self.library.llama_get_logits(self.context)
                yield np.ctypeslib.as_array(logits, shape=(asked, self.owner.vocabulary))

    def close(self) -> None:
        """Give its memory back."""
        self.library.llama_free(self.context)

    def _compute(self, ids: list[int], position: int, silent: int) -> int:
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position + at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, at >= silent
        code = self.library.llama_decode(self.context, batch)
        self.library.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")
        return len(ids) - silent


class Llama:
    """A file in llama.cpp, and sequences of it by their numbers."""

    def __init__(self, path: str, threads: int) -> None:
        self.library = importlib.import_module("llama_cpp")
        self.threads = threads or len(os.sched_getaffinity(0))
        self.library.llama_backend_init()
        params = self.library.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.library.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.vocabulary = self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.model))
        self.whole: Context | None = None  # of `run`
        self.sequences: dict[int, tuple[Context, np.ndarray]] = {}

    def answer(self, asked: dict[str, Any]) -> dict[str, int]:
        """See the module."""
        if "run" in asked:
            return {"rows": self.run(asked["run"], asked["out"])}
        if "begin" in asked:
            made = np.memmap(asked["out"], np.float32, "w+", shape=(ROWS, self.vocabulary))
            self.sequences[asked["begin"]] = Context(self, asked["room"], BATCH), made
            return {"begun": asked["begin"], "rows": ROWS}
        if "read" in asked:
            return {"kept": self.read(asked)}
        if "end" in asked:
            self.sequences.pop(asked["end"])[0].close()
            return {}
        return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    def run(self, ids: list[int], out: str) -> int:
        """Logits of every position, into an .npy file."""
        if self.whole is None or self.whole.room < len(ids):
            if self.whole is not None:
                self.whole.close()
            self.whole = Context(self, len(ids) + 1, CHUNK)
        self.whole.keep(0)
        made = np.lib.format.open_memmap(out, "w+", np.float32, (len(ids), self.vocabulary))
        done = 0
        for logits in self.whole.read(ids, 0, len(ids)):
            made[done : done + len(logits)] = logits
            done += len(logits)
        made.flush()
        return done

    def read(self, asked: dict[str, Any]) -> int:
        """Tokens of a sequence."""
        context, made = self.sequences[asked["read"]]
        kept = context.keep(asked["length"])
        if kept == asked["length"]:
            done = 0
            for logits in context.read(asked["ids"], kept, asked["wanted"]):
                made[done : done + len(logits)] = logits
                done += len(logits)
        return kept


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library prints
    path, threads = sys.argv[1:]
    model = Llama(path, int(threads))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(model.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
