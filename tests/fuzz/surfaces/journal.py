"""params.journal, which an interrupted compile leaves and the next one continues from."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.harness import Surface

KEY = "0" * 64


@dataclass
class State:
    file: Path
    lines: list[Any]


def prepare(inputs: Any, folder: Path) -> State:
    from gemma_deploy.params.journal import Journal
    from gemma_deploy.params.table import ParamRow

    file = folder / "params.journal"
    journal = Journal(file, KEY)
    journal.start(afresh=True)
    row = ParamRow("model.norm.weight", "float32", (64,), 4096, 256, "0" * 64, "cast", 40.0, 1.0)
    journal.finish_jobs([("model.norm.weight", [row]), ("model.embed_tokens.weight", [row, row])])
    journal.finish_file(file.stat())
    journal.close()
    return State(file, [json.loads(line) for line in file.read_text().splitlines()])


def attempt(state: State, random: Random) -> None:
    from gemma_deploy.params.journal import Journal, read_finished

    lines = [mutate.json_tree(line, random) if random.random() < 0.4 else line for line in state.lines]
    if random.random() < 0.5:
        lines[0] = state.lines[0]
    written = [mutate.json_text(line, random) if random.random() < 0.2 else json.dumps(line).encode() for line in lines]
    raw = b"\n".join(written) + b"\n"
    state.file.write_bytes(mutate.raw_bytes(raw, random) if random.random() < 0.3 else raw)
    rows, record = read_finished(state.file, KEY)
    for row in rows:
        assert isinstance(row.offset + row.nbytes, int)
    assert record is None or isinstance(record, dict)
    journal = Journal(state.file, KEY)
    journal.start(afresh=False)
    journal.close()


SURFACE = Surface("journal", prepare, attempt)
