"""How llama.cpp writes Gemma 3n down: a width for each layer, shares of gates as multiples of their deviation.

The rank of LAuReL follows from its tensor. Maps between streams are stacked in two tensors, and both tables have as
many rows as there are tokens: tokens behind those that the model has vectors for have zeros there.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

from gemma_deploy.architectures import gguf_keys
from gemma_deploy.architectures.base import FULL, SLIDING
from gemma_deploy.architectures.gemma4_gguf import PER_LAYER_BLOCKS, PER_LAYER_OUTSIDE, TABLE, TOKENS
from gemma_deploy.architectures.gguf import Gguf, Metadata
from gemma_deploy.architectures.shared import GGUF_BLOCKS, GGUF_FOUR_NORMS, GGUF_HEAD_NORMS
from gemma_deploy.names import STREAM_PROJECTION, STREAM_UNEMBED

LAUREL, SPARSITY = "blk.0.laurel_l.weight", "activation_sparsity_scale"
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4
CLOSE, DIGITS = 1e-5, 6  # of a multiple, and of the share that it is read as
NORMAL = NormalDist()


def config(meta: Metadata) -> dict[str, Any]:
    """Keys of config.json from a GGUF file's metadata and tensors."""
    layers = gguf_keys.layer_count(meta)
    if layers is None:
        return {}
    kinds = gguf_keys.layer_types(meta, layers)
    found: dict[str, Any] = {
        "layer_types": list(kinds),
        "num_kv_shared_layers": gguf_keys.whole_number(meta, "attention.shared_kv_layers", least=0, most=layers - 1),
        "hidden_size_per_layer_input": gguf_keys.whole_number(meta, "embedding_length_per_layer_input", most=1 << 16),
        "vocab_size_per_layer_input": meta.rows(TABLE if meta.has(TABLE) else TOKENS),
        "laurel_rank": _rank(meta),
        "altup_num_inputs": gguf_keys.whole_number(meta, "altup.num_inputs", least=2, most=64),
        "altup_active_idx": gguf_keys.whole_number(meta, "altup.active_idx", least=0, most=63),
        "activation_sparsity_pattern": _shares(meta, layers),
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": meta("rope.freq_base") or GLOBAL_THETA},
            SLIDING: {"rope_type": "default", "rope_theta": meta("rope.freq_base_swa") or LOCAL_THETA},
        },
    }
    if (widths := gguf_keys.by_layer(meta, "feed_forward_length", layers)) is not None:
        found["intermediate_size"] = list(widths)
    if SLIDING in kinds:
        found["sliding_window"] = gguf_keys.whole_number(meta, "attention.sliding_window")
    if (cap := meta("final_logit_softcapping")) is not None:
        found["final_logit_softcapping"] = cap
    return found


def _rank(meta: Metadata) -> int:
    rank = meta.rows(LAUREL)
    if rank is None:
        meta.problem(LAUREL, None, "the matrix whose rows are the rank of LAuReL")
    return rank or 1


def _shares(meta: Metadata, layers: int) -> list[float]:
    """The share of gates that are zero, of each layer: llama.cpp has by how many deviations the mean is exceeded."""
    given = meta(SPARSITY)
    right = isinstance(given, list) and len(given) == layers
    if not right or not all(isinstance(one, float) and one < math.inf for one in given):
        meta.problem(SPARSITY, given, f"a list of {layers} numbers, -inf where no gate is zero")
        return [0.0] * layers
    return [_share(one) for one in given]


def _share(multiple: float) -> float:
    share = 0.0 if multiple == -math.inf else NORMAL.cdf(multiple)
    short = round(share, DIGITS)
    return short if 0 < short < 1 and abs(NORMAL.inv_cdf(short) - multiple) < CLOSE else share


GEMMA3N_GGUF = Gguf(
    "gemma3n",
    {
        **GGUF_BLOCKS,
        **GGUF_FOUR_NORMS,
        **GGUF_HEAD_NORMS,
        **PER_LAYER_BLOCKS,
        "laurel_l": "laurel.linear_left",
        "laurel_r": "laurel.linear_right",
        "laurel_post_norm": "laurel.post_laurel_norm",
        "altup_correct_coef": "altup.correction_coefs",
        "altup_predict_coef": "altup.prediction_coefs",
        "altup_router": "altup.modality_router",
        "altup_router_norm": "altup.router_norm",
    },
    config,
    whole={"altup_correct_scale.weight": "altup.correct_output_scale"},
    outside=PER_LAYER_OUTSIDE,
    stacked={"altup_proj.weight": STREAM_PROJECTION, "altup_unembd_proj.weight": STREAM_UNEMBED},
)
