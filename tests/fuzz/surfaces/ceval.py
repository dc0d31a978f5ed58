"""A C-Eval archive: its bytes, headers of its members, and their CSV."""

import io
import struct
import zipfile
from pathlib import Path
from random import Random

from tests.calibration import make
from tests.fuzz import mutate
from tests.fuzz.harness import Surface, run
from tests.fuzz.inputs import Inputs, copy
from tests.fuzz.surfaces.c4 import calibrate

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
CSV = (",", '"', '""', "\r", "\n\n", "\0", "id", "答案", "x" * 200_000, "\ufeff")


def prepare(inputs: Inputs, folder: Path) -> Path:
    copy(inputs.checkpoint("gemma"), folder / "model")
    return folder


def archive(random: Random) -> bytes:
    """A zip whose members were changed before they were packed."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", random.choice(METHODS)) as packed:
        for split in ("dev", "val", "test"):
            table = make.table(make.questions(3, split))
            if random.random() < 0.4:
                table = mutate.raw_bytes(table, random)
            if random.random() < 0.3:
                words = random.choice(CSV).encode()
                at = random.randrange(len(table) + 1)
                table = table[:at] + words + table[at:]
            name = random.choice((f"{split}/a_{split}.csv", f"x/{split}/a_{split}.csv", f"{split}/größe_{split}.csv"))
            packed.writestr(name, table)
        if random.random() < 0.1:
            packed.writestr(
                "dev/b_dev.csv", b"id,question,A,B,C,D,answer\n" + b"0,q,a,b,c,d,A\n" * random.choice((10, 250_000))
            )
    return out.getvalue()


def attempt(folder: Path, random: Random) -> None:
    raw = archive(random)
    if random.random() < 0.5:
        raw = mutate.raw_bytes(raw, random)
    if random.random() < 0.3:  # a field of a header: version, flags, method, sizes
        data = bytearray(raw)
        at = data.rfind(b"PK\1\2")
        if 0 <= at < len(data) - 46:
            field = random.choice((4, 6, 8, 10, 20, 24, 28, 30, 32, 42))
            struct.pack_into("<H", data, at + field, random.choice((0, 1, 63, 99, 65535)))
        raw = bytes(data)
    if random.random() < 0.7:
        calibrate(folder, "ceval", raw)
    else:
        (folder / "data").write_bytes(raw)
        run("eval", folder / "model", "--task", "ceval", "--path", folder / "data", "--limit", "1", "--no-record")


SURFACE = Surface("ceval", prepare, attempt)
