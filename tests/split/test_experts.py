"""A model with experts in parts: their tensors keep three dimensions, and the chain computes what the whole does."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.partition import spans_of
from gemma_deploy.split import SplitChain, load_part
from gemma_deploy.split.writing import write_split
from gemma_deploy.testing import TINY_EXPERTS, write_tiny_checkpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The checkpoint, and its parts on disk."""
    folder = tmp_path_factory.mktemp("experts")
    path = write_tiny_checkpoint(folder / "ck", "gemma4_text", num_hidden_layers=3, **TINY_EXPERTS)
    write_split(Checkpoint.open(path), spans_of(3, [1, 2]), folder / "parts")
    return folder


def test_parts_have_their_experts_as_transformers_has_them(written):
    with safe_open(written / "parts" / "trunk" / "model.safetensors", "pt") as part:
        assert part.get_slice("model.layers.0.experts.gate_up_proj").get_shape() == [8, 192, 64]
        found = part.get_tensor("model.layers.0.experts.down_proj")
    with safe_open(written / "ck" / "model.safetensors", "pt") as whole:
        assert torch.equal(found, whole.get_tensor("model.layers.1.experts.down_proj"))
    assert json.loads((written / "parts" / "trunk" / "config.json").read_text())["num_experts"] == 8


def test_the_chain_is_the_whole_bit_for_bit(written):
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    stock = AutoModelForCausalLM.from_pretrained(written / "ck", dtype=torch.float32, **eager).eval()
    names = [row["name"] for row in json.loads((written / "parts" / "split.json").read_text())["parts"]]
    chain = SplitChain([load_part(written / "parts" / name, dtype=torch.float32) for name in names])
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, chain(ids).logits)
