"""Column factors of the matrix that the LM head reads: the token table where the two are tied, else the head's own.

The head's input is divided by them in the last norm's gain. A tied table is what the embedding reads as well, so there
its output is divided by them in its scale, which becomes one number per column. Real 270M, linears quantized, 4 windows
of 512 tokens of WikiText-2, mean KL with an int8 table:

    float table 0.0013; a scale per row 0.0053, with factors 0.0024; groups of 128 0.0022, with factors 0.0021;
    groups of 64 0.0017, with factors 0.0018 (they amplify the noise of what is embedded)

so that factors are for a scale per row alone. Error compensation gains little in groups (0.0020 and 0.0017).
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from gemma_deploy.calibration.layer_weights import head_input, refuse_nonfinite, template_stack
from gemma_deploy.checkpoint import WeightSource
from gemma_deploy.names import COLUMN_SCALE, NORM, NORM_WEIGHT
from gemma_deploy.quantization.equalize import MOST_ROWS, column_factors
from gemma_deploy.quantization.layers import hidden_states
from gemma_deploy.quantization.results import read_record, table_file, write_result
from gemma_deploy.schemes import Codes

FACTORS = "factors"
READ_ROWS = 64  # neighbours read together when rows are sampled


@torch.inference_mode()
def scale_table(
    checkpoint: WeightSource, shape: tuple[int, int], folder: Path, *, codes: Codes | None, embed_scale: str = "exact"
) -> dict[str, Any]:
    """Choose the factors for what the quantized layers give, and fold them.

    Args:
        checkpoint: whose weights.
        shape: (nsamples, seqlen) of the windows that `quantize_layers` was given.
        codes: of table and head. Without them (float16), or in groups, there are no factors.
        folder: its folder; gets `NORM`, `FACTORS` [hidden] and, with a tied table, `COLUMN_SCALE` [hidden], and loses
            the hidden states.

    Returns:
        A record: smallest and largest factor.

    Raises:
        CalibrationError: the norm gives NaN or infinity.
    """
    file = table_file(folder)
    if (known := read_record(file)) is not None:
        return known
    if codes is None or codes.groupsize:
        hidden_states(checkpoint, shape, folder).close()
        record: dict[str, Any] = {}
        write_result(file, {}, record)
        return record
    stack, _ = template_stack(checkpoint.config, embed_scale)
    power, count = torch.zeros(checkpoint.config.hidden_size, dtype=torch.float64), 0
    with closing(hidden_states(checkpoint, shape, folder)) as states, head_input(checkpoint, stack) as made:
        for window in range(shape[0]):
            hidden = made(states.read(window))
            refuse_nonfinite(hidden, checkpoint.path, NORM, window=window)
            power += hidden[0].double().square().sum(0)
            count += shape[1]
        factors = column_factors([_some_rows(checkpoint)], (power / count).float())
        offset = checkpoint.config.architecture.norm_offset
        gain = offset + stack.norm.weight.double()
        folded = {
            NORM_WEIGHT: (gain / factors.double() - offset).float(),
            FACTORS: factors,
        }
        if checkpoint.config.tie_word_embeddings:
            folded[COLUMN_SCALE] = float(stack.embed_tokens.scale_value(torch.float32)) / factors
        record = {"smallest_factor": float(factors.min()), "largest_factor": float(factors.max())}
        write_result(file, folded, record)
    return record


def _some_rows(checkpoint: WeightSource) -> torch.Tensor:
    """[about MOST_ROWS, hidden]: runs of rows, evenly spread over the matrix that the head reads."""
    name = checkpoint.config.head_weight
    rows = checkpoint.tensors[name].shape[0]
    step = max(READ_ROWS, rows * READ_ROWS // MOST_ROWS)
    starts = range(0, rows, step)
    return torch.cat([torch.from_numpy(checkpoint.rows(name, at, min(at + READ_ROWS, rows))) for at in starts])
