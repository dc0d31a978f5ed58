"""config.json of a checkpoint of each generation."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.harness import Surface, run
from tests.fuzz.inputs import Inputs, copy

ROPE = {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}
KEYS = {
    "rope_parameters": {"full_attention": ROPE, "sliding_attention": {}},
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "layer_types": ["sliding_attention", "full_attention"],
    "quantization_config": {"quant_method": "gptq"},
    "text_config": {"model_type": "gemma3_text"},
    "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    "architectures": ["Other"],
    "torch_dtype": "float16",
    "attention_bias": False,
    "use_bidirectional_attention": False,
    "num_kv_shared_layers": 2,
}  # fmt: skip
RECIPE = """\
name: t
frontend: {checkpoint: %s, shape: {input_ids: [[16], [32]]}}
backend: {type: onnxruntime, dtype: int8}
workspace: {path: %s}
"""


@dataclass
class State:
    folder: Path
    configs: dict[str, dict[str, Any]]


def prepare(inputs: Inputs, folder: Path) -> State:
    configs = {}
    for model_type in ("gemma", "gemma2", "gemma3_text"):
        place = copy(inputs.checkpoint(model_type), folder / model_type)
        configs[model_type] = json.loads((place / "config.json").read_text())
        (folder / f"{model_type}.yaml").write_text(RECIPE % (place, folder / "work"))
    return State(folder, configs)


def attempt(state: State, random: Random) -> None:
    model_type = random.choice(list(state.configs))
    config = dict(state.configs[model_type])
    for key in random.sample(list(KEYS), random.choice((0, 0, 1, 2))):
        config[key] = KEYS[key]
    (state.folder / model_type / "config.json").write_bytes(mutate.json_file(config, random))
    if random.random() < 0.5:
        run("inspect", state.folder / model_type)
    else:
        run("compile", state.folder / f"{model_type}.yaml", "--dry-run")


SURFACE = Surface("config_json", prepare, attempt)
