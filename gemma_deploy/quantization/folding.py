"""Which rows of the linear before feed the columns of one that reads what it makes; data about a layer, no arithmetic.

A norm's gain absorbs any factor of a linear's columns. What feeds o_proj is a weighted mean of value rows, and what
feeds down_proj is the product of the activation with up_proj's output, so that factors there are those of rows of
v_proj and up_proj, whose scales are free.
"""

from __future__ import annotations

import torch

from gemma_deploy.architectures import InputGroup, LayerSpec


def shared_rows(layer: LayerSpec, group: InputGroup) -> torch.Tensor | None:
    """[columns] row of the group's maker that feeds each column; None where every column has its own."""
    rows = layer.feeding_rows(group)
    return None if rows is None else torch.tensor(rows)
