"""Values that people guess, from other tools' words, and what to write in their place.

`schemes.QUANTIZERS` and `backends.ROWS` say what there is; here stands which of it a guess means.
"""

from __future__ import annotations

import re
from typing import Any

from gemma_deploy.recipe.document import Path

DTYPE: Path = ("backend", "dtype")
TYPE: Path = ("frontend", "quantize", "type")
SHAPE: Path = ("frontend", "shape", "input_ids")

FOUR_BITS = (
    "4 bits are frontend.quantize.type: w4a16_gptq (or w4a16, which is worse), with backend.dtype: int8; "
    "the recipe cpu-small-int4 has them"
)
GGUF_FILE = "a .gguf file is a checkpoint: frontend.checkpoint: FILE.gguf; backend.dtype says what it becomes"
FLOAT = "write backend.dtype: {}, and no frontend.quantize"
SIZES = r"(bits?|[01]|k[sml]?|xs|nl|g\d+)?"  # what ggml and others put behind the bits
# Key -> (what a guess looks like, what to write), the first that fits counts. Guesses are in small letters, without
# separators.
GUESSES: dict[Path, tuple[tuple[str, str], ...]] = {
    DTYPE: (
        (rf"(u?int|[iuqw]|nf|fp|float)?4{SIZES}|awq|bnb|gptq4.*", FOUR_BITS),
        (r"w8a8.*", "write backend.dtype: int8, and frontend.quantize.type: w8a8 (the recipe cpu-long-prompts-w8a8)"),
        (r"(w8a16|int8|w8|q8)?gptq.*", "write backend.dtype: int8, and frontend.quantize.type: w8a16_gptq "
         "(the recipe cpu-best-int8)"),
        (rf"([uqiw]|u?int)?8{SIZES}|w8a16", "write backend.dtype: int8"),
        (r"fp8.*|float8.*|e[45]m[23].*", "floats of 8 bits are not built; write backend.dtype: int8"),
        (r"gguf|ggml", GGUF_FILE),
        (r"f(loat)?(32)?|single", "write backend.dtype: fp32"),
        (r"f(loat)?16|half", "write backend.dtype: fp16"),
        (r"bfloat(16)?|brain.*", "write backend.dtype: bf16"),
    ),
    TYPE: (
        (rf"(u?int|[iuqw]|nf|fp|float)?4{SIZES}|awq|bnb|gptq4.*", FOUR_BITS),
        (r"(w8a16)?gptq8?|w8gptq", "write w8a16_gptq for 8 bits (the recipe cpu-best-int8), w4a16_gptq for 4 "
         "(cpu-small-int4)"),
        (r"kv|kv8|kvint8|cache|int8(kv)?cache|kvcache.*", "an int8 cache is +kv8 behind the type of the weights, such "
         "as w8a16_gptq+kv8, or w16kv8 with weights of 16 bits"),
        (rf"([uqiw]|u?int)?8{SIZES}|rtn|smoothquant", "8 bits are w8a16 (looks at no data), w8a16_gptq "
         "(calibrated, least loss) or w8a8 (activations too); the recipes cpu-int8, cpu-best-int8, "
         "cpu-long-prompts-w8a8"),
        (r"fp8.*|float8.*|e[45]m[23].*", "floats of 8 bits are not built; w8a16 has integers of 8 bits"),
        (r"gguf|ggml", GGUF_FILE),
        (r"f(loat|p)?32|none|no", FLOAT.format("fp32")),
        (r"f(loat|p)?16|half|w16(a16)?", FLOAT.format("fp16")),
        (r"bf(loat)?16|bf16", FLOAT.format("bf16")),
    ),
    ("backend", "type"): (
        (r"ort|onnx.*|genai|cpu", "write backend.type: onnxruntime (the recipe cpu-int8)"),
        (r"own|kernels?|library|c(pp)?", "write backend.type: native (the recipe native-int8)"),
        (r"vacc|tvm|vamc|vastai|accelerator|static", "write backend.type: tvm_vacc (the recipe accelerator-int8)"),
    ),
    ("frontend", "type"): ((r"hf|safetensors|transformers|pytorch|torch", "write frontend.type: huggingface"),),
    ("frontend", "quantize"): (
        (r".*", "write frontend.quantize: {type: w8a16}, or another type that `gemma-deploy recipes` shows"),
    ),
}  # fmt: skip
LENGTHS = "write [[prefill length], [context length]], such as [[1024], [2048]]"


def advice(path: Path, value: Any) -> str:
    """What to write in the place of a value that the schema refuses; "" where nobody can know."""
    if path[:3] == SHAPE:
        return LENGTHS
    if not isinstance(value, str | int | float):
        return ""
    said = re.sub(r"[\s_.+-]", "", str(value).lower())
    return next((words for pattern, words in GUESSES.get(path, ()) if re.fullmatch(pattern, said)), "")
