"""A tiny model of each generation, whole and in three parts, and a padded prompt of five windows."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_deploy.split import ModelFactory


@pytest.fixture(scope="module")
def parts(model_type, checkpoint_dir):
    """Bottom, trunk and top in float32."""
    return ModelFactory.create_split_models(
        model_type=model_type, model_name_or_path=checkpoint_dir, split_point_1=1, split_point_2=2
    )


@pytest.fixture(scope="module")
def stock(checkpoint_dir):
    """Transformers' own model, float32."""
    return AutoModelForCausalLM.from_pretrained(checkpoint_dir, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompt():
    """Token ids [2, 40], and a mask with 7 columns of padding on the left of the first row."""
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return ids, mask
