"""The gates of the static pair."""

from __future__ import annotations

from dataclasses import replace

from gemma_deploy.backends.tvm_vacc.segments import UNROUNDED
from gemma_deploy.parity.gates import GATES, Gate
from gemma_deploy.schemes import Scheme

# What an int8 cache may add: five times what it adds on the real 270M (docs/quantization.md).
CACHE_LIMITS = {"kl_mean": 0.002, "ppl_delta": 0.002}


def gates_of(scheme: str, int8_cache: bool) -> tuple[Gate, ...]:
    """The gates of an artifact.

    Where rounding is part of the graph, a difference of 1e-7 in front of it moves one code in 5000 by a whole step, and
    those of the layers after it follow: two sound implementations end as far apart as either is from float32. So what
    is around the rounding is compared without it, the rounding itself by rounding.py, and the sum of both by how near
    it comes to the model.
    """
    activations = Scheme(scheme).rounds_activations
    if not (activations or int8_cache):
        return GATES[scheme]
    found, judged = [], set()
    for gate in GATES[scheme]:
        reference, test = gate.pair
        if test != "strict":
            found.append(gate)
            continue
        distance = gate.measure in CACHE_LIMITS
        if not (distance and activations):  # of those, the limit is on what activations lose
            found.append(replace(gate, pair=(reference, UNROUNDED)))
        if distance or gate.measure == "bad_test":
            judged.add(gate.measure)
            more = CACHE_LIMITS.get(gate.measure, 0) if int8_cache else 0
            found.append(replace(gate, limit=gate.limit + more))
    if "kl_mean" not in judged:
        reference = next(gate.pair[0] for gate in GATES[scheme] if gate.pair[0].startswith("hf"))
        found.append(Gate((reference, "strict"), "bad_test", 0))
        found.append(Gate((reference, "strict"), "kl_mean", CACHE_LIMITS["kl_mean"], ("text",), pooled=True))
    return tuple(found)
