"""A checkpoint for vLLM in int8, in its own environment: CHECKPOINT OUT.

Linears get a scale for each row, to nearest, and are described as compressed-tensors does; activations are rounded by
vLLM, a scale for each token. Table and head stay as they are: it has no kernel for them.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

checkpoint, out = map(Path, sys.argv[1:])
out.mkdir(parents=True, exist_ok=True)
for file in checkpoint.iterdir():
    if file.suffix == ".json" and file.name not in ("config.json", "model.safetensors.index.json"):
        (out / file.name).symlink_to(file.resolve())
tensors: dict[str, torch.Tensor] = {}
for file in sorted(checkpoint.glob("*.safetensors")):
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118  it is no dictionary
            weight = opened.get_tensor(name)
            if not name.endswith("_proj.weight"):
                tensors[name] = weight
                continue
            scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            tensors[name] = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
            tensors[f"{name}_scale"] = scale.to(weight.dtype)
save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
common = {"num_bits": 8, "type": "int", "symmetric": True}
scheme = {
    "targets": ["Linear"],
    "weights": {**common, "strategy": "channel", "dynamic": False},
    "input_activations": {**common, "strategy": "token", "dynamic": True},
}
config = json.loads((checkpoint / "config.json").read_text())
config["quantization_config"] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": scheme},
    "ignore": ["lm_head"],
}
(out / "config.json").write_text(json.dumps(config, indent=1))
