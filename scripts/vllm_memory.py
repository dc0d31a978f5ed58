"""Print what each GPU holds, for every Gemma that is built for vLLM, as a table of Markdown (docs/scale.md).

usage: vllm_memory.py [--context N] [--batch N] [--model NAME]...

Shapes are those that were published; a checkpoint of holes is planned as `gemma-deploy plan` plans it: weights as the
file has them, keys and values of all texts, what a step works on. Nothing is downloaded, and no weight is read.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from make_checkpoint import write_checkpoint

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.partition import division_problems
from gemma_deploy.planning.choices import Choice, Wanted, longest, open_choice
from gemma_deploy.planning.sizes import sizes_of

GPU, BACKEND = "gpu", "vllm"
COLUMNS = [("bf16", 1), ("bf16", 2), ("bf16", 4), ("w8a8", 1), ("w8a8", 2), ("w4a16_gptq", 1), ("w4a16_gptq", 2)]
# Hidden size, layers, query heads, KV heads, channels of a head, width of the MLP.
SIZES = {
    "Gemma 2B": ("gemma", 2048, 18, 8, 1, 256, 16384),
    "Gemma 7B": ("gemma", 3072, 28, 16, 16, 256, 24576),
    "Gemma 2 2B": ("gemma2", 2304, 26, 8, 4, 256, 9216),
    "Gemma 2 9B": ("gemma2", 3584, 42, 16, 8, 256, 14336),
    "Gemma 2 27B": ("gemma2", 4608, 46, 32, 16, 128, 36864),
    "Gemma 3 270M": ("gemma3_text", 640, 18, 4, 1, 256, 2048),
    "Gemma 3 1B": ("gemma3_text", 1152, 26, 4, 1, 256, 6912),
    "Gemma 3 4B, its text model": ("gemma3_text", 2560, 34, 8, 4, 256, 10240),
    "Gemma 3 12B, its text model": ("gemma3_text", 3840, 48, 16, 8, 256, 15360),
    "Gemma 3 27B, its text model": ("gemma3_text", 5376, 62, 32, 16, 128, 21504),
}
CLASSES: dict[str, dict[str, Any]] = {
    "gemma": {"vocab_size": 256000, "max_position_embeddings": 8192},
    "gemma2": {
        "vocab_size": 256000, "max_position_embeddings": 8192, "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "vocab_size": 262144, "max_position_embeddings": 32768, "query_pre_attn_scalar": 256, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
    },
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    """config.json of a size."""
    kind, hidden, layers, heads, kv_heads, channels, width = SIZES[name]
    small = hidden <= 1152
    return {
        "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": channels, "intermediate_size": width, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e4, "bos_token_id": 2, "eos_token_id": 1,
        "pad_token_id": 0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        **CLASSES[kind], **({"sliding_window": 512 if small else 1024} if kind == "gemma3_text" else {}),
    }  # fmt: skip


def row(name: str, context: int, batch: int) -> list[str]:
    """GB of the GPU that holds most, for each of `COLUMNS`; a dash where heads cannot be divided so."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint.open(write_checkpoint(Path(folder), config_of(name), zeros=True))
        wanted = longest(checkpoint.config.max_position_embeddings, Wanted(1024, context, batch))
        cells = []
        for precision, ranks in COLUMNS:
            job = open_choice(checkpoint, Choice(BACKEND, precision), wanted)
            if isinstance(job, str):
                raise SystemExit(f"error: {name}, {precision}: {job}")
            if division_problems(job.config, (), ranks, align_qkv=True):
                cells.append("-")
                continue
            held = sizes_of(job, Choice(BACKEND, precision, ranks), wanted, kind=GPU).total / 1e9
            cells.append(f"{held:.1f}" if held >= 1 else f"{held:.2f}")
        return cells


def table(names: list[str], context: int, batch: int) -> str:
    """A row for each."""
    head = ["GB on each GPU", *(f"{precision}, tp {ranks}" for precision, ranks in COLUMNS)]
    rows = [head, ["---"] * len(head), *([name, *row(name, context, batch)] for name in names)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--model", choices=list(SIZES), action="append", help="this alone")
    arguments = parser.parse_args()
    print(table(arguments.model or list(SIZES), arguments.context, arguments.batch), end="")


if __name__ == "__main__":
    main()
