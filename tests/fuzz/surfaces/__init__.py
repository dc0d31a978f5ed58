"""One file per surface; each has SURFACE."""

from importlib import import_module

NAMES = (
    "safetensors_header", "safetensors_index", "config_json", "generation_config", "gguf_file", "tokenizer_json",
    "tokenizer_config", "vocabulary", "chat_template", "runaway_template", "recipe", "overrides", "manifest", "graphs",
    "genai_config", "evaluation",
    "c4", "alpaca", "ceval", "parts", "calibration_record", "journal", "command_line",
)  # fmt: skip
SURFACES = {name: import_module(f"{__name__}.{name}").SURFACE for name in NAMES}
