"""`gemma-deploy embed`: vectors of texts from the artifact of an encoder."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_deploy.generation import keep_bytes_of_stdin, read_stdin
from gemma_deploy.options import NAME, PATH

if TYPE_CHECKING:
    import numpy as np

EPILOG = """\b
Examples:
  gemma-deploy embed workspace/NAME -p "Which planet is the Red Planet?" --prompt-name query
  gemma-deploy embed workspace/NAME -p "one text" -p "another" --dimensions 256
  gemma-deploy embed workspace/NAME --file documents.txt --prompt-name document --out documents.npy
  gemma-deploy embed workspace/NAME --prompt-name query --out queries.json < queries.txt

Every line of a file or of standard input is a text. A prompt is what the model was trained to see in front of a kind of
text; `gemma-deploy inspect` lists them.
"""


@click.command("embed", epilog=EPILOG)
@click.argument("artifact", type=PATH)
@click.option("-p", "--text", "texts", multiple=True, metavar="TEXT", help="A text. Repeatable.")
@click.option("--file", "file", type=PATH, help="UTF-8 file, a text on every line.")
@click.option("--prompt-name", type=NAME, metavar="KIND", help="The kind of text, such as query or document.")
@click.option("--dimensions", type=click.IntRange(min=1), help="Channels of a vector  [default: all of them]")
@click.option("--out", type=PATH, help=".npy (float32 [texts, dimensions]) or .json  [default: JSON, printed]")
@click.option("--batch", type=click.IntRange(1, 4096), default=8, show_default=True, help="Texts that run together.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, show_default=True, help="0 takes all cores.")
@click.option("--strict", is_flag=True, help="Compute exactly what the graph says (slow).")
@click.option("--stats", is_flag=True, help="Say how many texts and how fast, at the end.")
def command(
    artifact: Path,
    texts: tuple[str, ...],
    file: Path | None,
    prompt_name: str | None,
    dimensions: int | None,
    out: Path | None,
    batch: int,
    threads: int,
    strict: bool,
    stats: bool,
) -> None:
    """Make a vector of length 1 of each text with ARTIFACT: those of -p, of --file, or of standard input.

    The cosine of two vectors is their product. A text that is too long is cut, which is told.
    """
    from gemma_deploy.artifact.check import open_whole
    from gemma_deploy.engine import open_embedder
    from gemma_deploy.reading import refuse_output

    if out is not None:
        refuse_output(out, "--out")
        if out.suffix not in (".npy", ".json"):
            raise click.UsageError(f"--out {out}: expected a name that ends in .npy or .json")
    if texts and file is not None:
        raise click.UsageError("give texts with -p or in a file, not both")
    opened, started = open_whole(artifact, hashes=True), time.perf_counter()
    embedder = open_embedder(opened, threads=threads, strict=strict)
    prompt = embedder.prompt(prompt_name)
    asked, loaded = list(texts) or _lines(file), time.perf_counter()
    vectors = embedder.embed(asked, prompt_name=prompt_name, dimensions=dimensions, batch=batch)
    done = time.perf_counter()
    _write(vectors, out, {"prompt": prompt, "dimensions": vectors.shape[1]})
    if stats:
        rate = len(asked) / max(1e-9, done - loaded)
        click.echo(f"loading {loaded - started:.2f} s; {len(asked)} texts in {done - loaded:.2f} s, {rate:.1f} texts/s",
                   err=True)  # fmt: skip


def _lines(file: Path | None) -> list[str]:
    """Every line of a file, or of standard input."""
    from gemma_deploy.reading import read_text, text_kind

    if file is None:
        keep_bytes_of_stdin()
        whole = read_stdin()
    else:
        whole = read_text(file, text_kind("--file"))
    return whole.split("\n")[: -1 if whole.endswith("\n") else None] if whole else []


def _write(vectors: np.ndarray, out: Path | None, said: dict[str, Any]) -> None:
    """As JSON or .npy, whole or not there."""
    import numpy as np

    from gemma_deploy.writing import write_bytes, write_text

    if out is not None and out.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, vectors, allow_pickle=False)
        write_bytes(out, buffer.getvalue())
        return
    # The shortest digits that give the float32 back.
    rows = ",\n".join(f"[{', '.join(np.format_float_positional(x, trim='0') for x in row)}]" for row in vectors)
    text = f'{json.dumps(said)[:-1]}, "embeddings": [\n{rows}\n]}}'
    if out is None:
        click.echo(text)
    else:
        write_text(out, text + "\n")
