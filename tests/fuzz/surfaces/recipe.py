"""A recipe's YAML."""

from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.harness import Surface, run

RECIPE = """\
name: t
frontend:
  checkpoint: ${GEMMA_CHECKPOINT:-demo}
  type: huggingface
  shape:
    input_ids: [[16], [32]]
    batch: 1
    dynamic: false
  model_kwargs: {tp: 1, b2s: false, embed_scale: exact, align_qkv: false}
  quantize:
    type: w4a16_gptq
    table: int8_g32
    calib_args: {percdamp: 0.1, groupsize: 32, keep_w8: [k_proj], sensitivity: false}
split:
  points: []
dataset:
  name: c4:64,alpaca:64
  path: c4=hub:a/b@main
  seqlen: 64
backend:
  type: onnxruntime
  dtype: int8
  compile: {block: 32, prefill: lean}
parity:
  text: "a.txt"
  prompt_tokens: 8
  gate: true
workspace:
  path: ./workspace
  workers: 2
"""
WORDS = (
    "!!python/object/apply:os.getcwd []", "!!binary aGk=", "!!int '3'", "!!float x", "*a", "&a [*a]", "&a {b: *a}",
    "<<: *x", "${A}", "${A:-${B}}", "${A:-1}", "'${A}'", "${", "%YAML 1.1", "---", "...", "? a", "? [a]", "|", ">-",
    "'", '"', "[[1], [2]]", "[" * 50, "{" * 50, "[" * 3000, "- " * 200, "? " * 200, "9" * 50, "9" * 5000,
    "0x" + "f" * 45, "1e400", "-1", "0", "2147483648", ".nan", ".inf", "-.inf", "1_000", "0o17", "1:30", "2001-01-01",
    "yes", "null", "~", "[]", "{}", "[{a: b}]", "x" * 300, "\t- a", "a: b: c", "# größe", "\ufeff", "\x07", "\u2028",
    "'\\ud83d'", '"\\uD83D"', '"\\0"', "hub", "hub:x", "c4:0", "c4:" + "9" * 5000, "w4a16+kv8", "fp16", "tvm_vacc",
    "gguf", "true", "1.5", "name: t", "frontend: {}", "zzz: 1",
)  # fmt: skip


def prepare(inputs: Any, folder: Path) -> Path:
    (folder / "a.txt").write_text("the list")
    return folder / "recipe.yaml"


def attempt(file: Path, random: Random) -> None:
    content = mutate.lines(RECIPE, random, WORDS).encode("utf-8", "surrogatepass")
    if random.random() < 0.15:
        content = mutate.raw_bytes(content, random)
    file.write_bytes(content)
    run("compile", file, "--dry-run")


SURFACE = Surface("recipe", prepare, attempt)
