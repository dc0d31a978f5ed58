"""A token table that is not trained, in the 16 bits that the checkpoint stores it in, for a model in float32.

Every number of a bfloat16 or float16 is one of float32: the rows of a batch are converted when they are looked up, and
blocks of rows when the LM head multiplies by them. The table of a 270M, most of its weights, takes 0.31 GiB, not 0.63.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gemma_deploy.checkpoint import WeightSource
from gemma_deploy.names import EMBEDDING, EMBEDDING_WEIGHT, HEAD, HEAD_WEIGHT
from gemma_deploy.split.factory import read_tensor

BLOCK_BYTES = 4 << 20  # of converted rows: they are multiplied while they are in the cache of the processor


def converted(table: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows in another dtype, and where they lie; all rows at once where nothing is to be converted.

    Args:
        table: [rows, columns]; dtype: of the blocks. A block is overwritten by the next one.
    """
    count, width = table.shape
    if table.dtype.itemsize >= dtype.itemsize:
        yield slice(0, count), table.to(dtype)
        return
    step = max(1, BLOCK_BYTES // (width * dtype.itemsize))
    block = torch.empty(min(step, count), width, dtype=dtype, device=table.device)
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield slice(start, stop), block[: stop - start].copy_(table[start:stop])


class StoredEmbedding(nn.Embedding):
    """Rows of the table in float32, times `embed_scale`.

    Args:
        weight: [vocabulary, hidden_size] of 16 bits; embed_scale: sqrt(hidden_size) in float32, a scalar.
    """

    def __init__(self, weight: nn.Parameter, embed_scale: float) -> None:
        super().__init__(*weight.shape, device="meta")
        self.weight, self.embed_scale = weight, embed_scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids: [batch, tokens] -> [batch, tokens, hidden_size], float32."""
        return super().forward(input_ids).float() * self.embed_scale


class StoredHead(nn.Linear):
    """The LM head of such a table, for logits in the dtype of the hidden states; a loss needs none (head.py).

    Args:
        weight: [vocabulary, hidden_size] of 16 bits.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [..., hidden_size] -> [..., vocabulary]."""
        step = max(1, BLOCK_BYTES // (hidden.element_size() * self.in_features))
        parts = [nn.functional.linear(hidden, block.to(hidden.dtype)) for block in self.weight.split(step)]
        return torch.cat(parts, dim=-1)


def keep_as_stored(model: Any, weights: WeightSource) -> None:
    """Give a model without values its table, and the head that is tied to it or not.

    Args:
        model: a causal LM of transformers, or of source_code/, on the meta device.
        weights: of its checkpoint, these matrices in 16 bits.
    """
    scale = float(model.get_submodule(EMBEDDING).embed_scale)
    table = _read(weights, EMBEDDING_WEIGHT)
    model.set_submodule(EMBEDDING, StoredEmbedding(table, scale))
    model.set_submodule(HEAD, StoredHead(_read(weights, HEAD_WEIGHT) if HEAD_WEIGHT in weights.tensors else table))


def _read(weights: WeightSource, name: str) -> nn.Parameter:
    """A matrix in the 16 bits that it is stored in, which become the same ones by way of float32."""
    stored = getattr(torch, weights.tensors[name].dtype)
    return nn.Parameter(read_tensor(weights, name, dtype=stored), requires_grad=False)
