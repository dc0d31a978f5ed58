"""A model as parts, each on its own device: bottom (embedding, first layers), trunk, top (last layers, norm, head).

    bottom, trunk, top = ModelFactory.create_split_models(
        model_type="gemma", model_name_or_path="gemma-2b", split_point_1=6, split_point_2=12, device="cpu"
    )
    output = top(trunk(bottom(input_ids)))  # output.logits
    model = SplitChain([bottom, trunk, top])  # a causal LM: loss and generate()

A part reads its own tensors alone. A new family joins with `@register(model_type, part)`; see registry.py.
"""

from gemma_deploy.split.base import Part
from gemma_deploy.split.chain import SplitChain
from gemma_deploy.split.choosing import Sampling
from gemma_deploy.split.factory import ModelFactory, from_pretrained_split, load_part, save_part
from gemma_deploy.split.parts import Bottom, Top, Trunk
from gemma_deploy.split.passing import Passed
from gemma_deploy.split.registry import REGISTRY, register

__all__ = [
    "REGISTRY", "Bottom", "ModelFactory", "Part", "Passed", "Sampling", "SplitChain", "Top", "Trunk",
    "from_pretrained_split", "load_part", "register", "save_part",
]  # fmt: skip
