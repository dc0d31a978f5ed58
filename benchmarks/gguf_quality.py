"""Files for llama.cpp beside those that llama.cpp's own quantizer makes of the same checkpoint: mean KL to float32.

    export GEMMA_DEPLOY_LLAMA=~/gguf/bin/python
    python benchmarks/gguf_quality.py CHECKPOINT --text wikitext2_valid.txt --out DIR

Of each name of `--files` in small letters an artifact is compiled (`gemma-deploy compile`, `backend.type: gguf`),
calibrated on the bundled samples; of each in capitals llama.cpp's `llama_model_quantize` makes a file of the artifact
`bf16`, whose weights are the checkpoint's own. What is in DIR already is taken as it is. Every file is read twice:
strictly, float32 arithmetic on its weights, and in llama.cpp, whose rounding of activations comes on top. Text: windows
of 512 tokens, BOS in front; the reference is transformers' class in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from gemma_deploy.backends.gguf.source import ENGINE, LlamaSource
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.evaluation.models import open_model
from gemma_deploy.evaluation.texts import make_windows, read_text
from gemma_deploy.names import GGUF
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.compare import compare_sources
from gemma_deploy.parity.reference import TorchSource
from gemma_deploy.parity.sources import LogitSource

ROOT = Path(__file__).resolve().parent.parent
QUANTIZE = ROOT / "benchmarks" / "peer_runtimes" / "llamacpp_quantize.py"
FLOATS = ("fp32", "bf16", "fp16")
NAMES = ("w8a16_gptq", "w8a16", "Q8_0", "w4a16_gptq", "w4a16_rtn", "Q4_0", *FLOATS)


def file_of(name: str, checkpoint: Path, out: Path) -> Path:
    """The file of a form of the model; made unless it is there."""
    if name != name.lower():
        file = out / f"{name}.gguf"
        if not file.exists():
            made = file_of("bf16", checkpoint, out)
            subprocess.run([ENGINE.python(), QUANTIZE, made, file, name], check=True, stdout=subprocess.DEVNULL)
        return file
    if not (out / name / GGUF).exists():
        recipe = out / f"{name}.yaml"
        codes = "" if name in FLOATS else f"  quantize: {{type: {name}, calib_args: {{sensitivity: false}}}}\n"
        recipe.write_text(
            f"name: {name}\nfrontend:\n  checkpoint: {checkpoint.resolve()}\n  shape: {{input_ids: [[512], [1024]]}}\n"
            f"{codes}backend: {{type: gguf, dtype: {name if name in FLOATS else 'int8'}}}\n"
            f"workspace: {{path: {out.resolve()}}}\n"
        )
        command = [sys.executable, "-m", "gemma_deploy.cli", "compile", recipe, "--no-parity"]
        subprocess.run(command, check=True, cwd=ROOT)
    return out / name / GGUF


def measure(file: Path, reference: TorchSource, case: Case) -> dict[str, float]:
    """Mean KL and top-1 of a file."""
    strict = TorchSource(Checkpoint.open(file), "patched", "fp32", name="strict")
    vocabulary = reference.checkpoint.config.vocab_size
    with closing(LlamaSource(file)) as llama:
        sources: dict[str, LogitSource] = {"hf": reference, "strict": strict, "llama.cpp": llama}
        pairs = [("hf", "strict"), ("hf", "llama.cpp"), ("strict", "llama.cpp")]
        found = compare_sources(sources, pairs, [case], vocab_size=vocabulary)
    pooled = {pair: found[pair].pooled()[case.name] for pair in pairs}
    kl = {f"{test} to {one}": pooled[one, test].kl_mean for one, test in pairs}
    return {**kl, "top1": pooled["hf", "llama.cpp"].top1, "MB": file.stat().st_size / 1e6}


def main() -> None:
    """Make what is missing, measure and print a table, and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--files", nargs="+", default=NAMES, help="of which names, in this order")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    ENGINE.python()
    opened = open_model(str(arguments.checkpoint))
    text, name = read_text(arguments.text)
    encode, bos = opened.encoder()
    windows = make_windows(text, encode, bos, count=arguments.windows, seqlen=arguments.seqlen, name=name).ids
    case = Case("text", tuple(tuple(map(int, window)) for window in windows), ((),) * len(windows))
    reference, rows = TorchSource(Checkpoint.open(arguments.checkpoint), "hf"), {}
    for name in arguments.files:
        file = file_of(name, arguments.checkpoint, arguments.out)
        rows[name] = measure(file, reference, case)
        print(f"{name:12} " + "  ".join(f"{what} {value:.6g}" for what, value in rows[name].items()), flush=True)
    print("RESULT " + json.dumps({"windows": len(windows), "tokens": arguments.seqlen, "files": rows}))


if __name__ == "__main__":
    main()
