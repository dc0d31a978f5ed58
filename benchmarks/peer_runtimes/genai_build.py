"""onnxruntime-genai's model builder, with Gemma 3's rope parameters flattened; the arguments are the builder's own.

As released, 0.18.0 stops at a Gemma 3 config of transformers 5 with KeyError 'rope_type', as the parameters are nested
there by layer type, and cannot be imported with transformers 4.
"""

import runpy
from typing import Any

import transformers

load_config = transformers.AutoConfig.from_pretrained


def flattened(*args: Any, **kwargs: Any) -> Any:
    """A config with rope parameters of full attention only, and sliding attention's base as transformers 4 has it."""
    config = load_config(*args, **kwargs)
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "full_attention" in rope:
        full, sliding = dict(rope["full_attention"]), rope["sliding_attention"]
        object.__setattr__(config, "rope_parameters", full)
        config.rope_theta, config.rope_local_base_freq = full["rope_theta"], sliding["rope_theta"]
    return config


transformers.AutoConfig.from_pretrained = flattened
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
