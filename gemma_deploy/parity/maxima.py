"""What the exponents of a float16 artifact are chosen from: a streamed pass over calibration windows.

Three windows of text and one of random tokens (which reach other rows of the table), in float32, with flat memory.
"""

from __future__ import annotations

import logging

import numpy as np

from gemma_deploy.calibration.mix import read_mix, shortened
from gemma_deploy.calibration.pipeline import Request, make_windows
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError
from gemma_deploy.progress import Tick
from gemma_deploy.quantization.rescaling import Rescaling, choose
from gemma_deploy.text import has_tokenizer

log = logging.getLogger(__name__)
TEXT_WINDOWS, SEQLEN = 3, 256


class NotFiniteError(CheckpointError):
    """An activation is NaN or infinite in float32."""


def windows_request(
    checkpoint: Checkpoint, *, dataset: str, path: str | None, context: int, embed_scale: str
) -> Request | None:
    """The windows of text to look at: `TEXT_WINDOWS`, of a mix at least one from each data set.

    Args:
        dataset, path: as in a recipe's dataset section.
        context: of the artifact; windows are no longer.

    Returns:
        None for a checkpoint without a tokenizer.
    """
    if not has_tokenizer(checkpoint):
        return None
    words = shortened(dataset, TEXT_WINDOWS)
    windows = read_mix(words).windows or TEXT_WINDOWS
    seqlen = min(SEQLEN, context, checkpoint.config.max_position_embeddings)
    return Request(words, path, windows, seqlen, embed_scale=embed_scale)


def measure_rescaling(
    checkpoint: Checkpoint, request: Request | None, *, context: int, embed_scale: str, progress: Tick | None = None
) -> Rescaling:
    """Run the windows and choose.

    Args:
        request: see `windows_request`.
        context: of the artifact.
        progress: called with (layers passed, all of them).

    Raises:
        CalibrationError: a data set is damaged or too short.
        NotFiniteError: the weights are damaged.
    """
    from gemma_deploy.parity.reference import TorchSource

    config = checkpoint.config
    seqlen = min(SEQLEN, context, config.max_position_embeddings)
    drawn = np.random.default_rng(1).integers(0, config.vocab_size, (1, seqlen))
    drawn[:, 0] = config.bos_token_id if config.bos_token_id is not None else 0
    ids = [drawn]
    if request is not None:
        ids.append(make_windows(checkpoint, request).ids)
    else:
        log.warning("the checkpoint has no tokenizer: float16's headroom is measured on random tokens alone")
    source = TorchSource(checkpoint, "patched", "fp32", embed_scale=embed_scale)
    source.progress = progress
    maxima = source.maxima(np.concatenate(ids))
    damaged = [point for point, found in maxima.items() if not np.isfinite(found)]
    if damaged:
        raise NotFiniteError(
            f"{damaged[0].rpartition('.')[0]} gives NaN or infinity in float32",
            where=str(checkpoint.path),
            expected="finite activations",
            next_step="its weights are damaged: copy or download them again",
        )
    return choose(config, maxima)
