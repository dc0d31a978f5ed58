"""The gate of an encoder: hf = patched = artifact in hidden states, and how near the vectors come to transformers'."""

from __future__ import annotations

import numpy as np

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.backends import backend_of
from gemma_deploy.backends.base import Proof
from gemma_deploy.checkpoint import WeightSource
from gemma_deploy.machine import give_memory_back
from gemma_deploy.parity.compare import ParityResult
from gemma_deploy.parity.encoder import (
    DISTANCE,
    DISTANCES,
    EXACT,
    LENGTH,
    STATES,
    UNIT,
    Run,
    cosine_distance,
    length_error,
    line,
    measure,
    own_vectors,
    reference_run,
    worst,
)
from gemma_deploy.parity.gates import headroom_line
from gemma_deploy.parity.reference import TorchSource
from gemma_deploy.quantization.rescaling import Rescaling

TOGETHER = 2  # texts in a batch: activations of all of them are alive at once
HF, PATCHED, STRICT, SHIPPED = "hf", "patched", "strict", "shipped"


def prove_encoder(proof: Proof, result: ParityResult) -> None:
    """Compare and judge.

    The artifact is run twice: to the letter, and with the kernels that a user gets. To the letter its hidden states
    repeat those of the model with its weights, float16 aside, whose activations are rounded; of both, the vectors are
    compared with transformers'.

    Raises:
        DeployError: a source could not run.
    """
    scheme, cases, opened = proof.manifest.scheme, proof.cases, proof.checkpoint
    hf = TorchSource(opened, "hf", embed_scale=proof.manifest.embed_scale)
    sources: dict[str, tuple[TorchSource, WeightSource]] = {
        HF: (hf, opened),
        PATCHED: (TorchSource(opened, "patched", embed_scale=proof.manifest.embed_scale), opened),
    }
    stored: WeightSource = opened
    same = PATCHED
    if scheme != "fp32":
        same, stored = f"patched {scheme}", ArtifactWeights(opened.config, proof.artifact, proof.manifest)
        own = TorchSource(stored, "patched", embed_scale=proof.manifest.embed_scale, name=same)
        sources[same] = (own, stored)
    runs: dict[str, Run] = {}
    for name, (source, weights) in sources.items():
        proof.report(f"running {name}")
        runs[name] = reference_run(source, weights, cases)
        give_memory_back()
    on_cpu = scheme != "bf16" or backend_of(proof.manifest).runs_bf16
    for name in (STRICT, *((SHIPPED,) if on_cpu else ())):
        proof.report(f"running {name}")
        runs[name] = _graph_run(proof, strict=name == STRICT)
        give_memory_back()
    _judge(proof, result, runs, (same, stored), on_cpu=on_cpu)
    if scheme == "fp16":
        result.lines.append(headroom_line(hf.absmax, proof.manifest.rescaling or Rescaling()))


def _graph_run(proof: Proof, *, strict: bool) -> Run:
    """Two texts of unequal lengths at a time, one of them padded, where the graph takes any number."""
    graph = backend_of(proof.manifest).encoder(Artifact(proof.artifact, proof.manifest), strict=strict)
    run = Run([], [])
    for case in proof.cases:
        made = [graph.both(case.prompts[at : at + TOGETHER]) for at in range(0, len(case.prompts), TOGETHER)]
        run.states.append([one for states, _ in made for one in states])
        run.vectors.append(np.concatenate([vectors for _, vectors in made]))
    return run


def _judge(
    proof: Proof, result: ParityResult, runs: dict[str, Run], weights: tuple[str, WeightSource], *, on_cpu: bool
) -> None:
    scheme, cases, (same, stored) = proof.manifest.scheme, proof.cases, weights
    limit = DISTANCES[scheme]
    pairs = [(HF, PATCHED), (same, STRICT), (HF, STRICT), *([(HF, SHIPPED), (STRICT, SHIPPED)] if on_cpu else [])]
    found = {pair: measure(pair, runs, cases) for pair in pairs}
    result.measures = [row for rows in found.values() for row in rows]
    result.lines.append(line(f"{HF} = {PATCHED}", STATES, worst(found[HF, PATCHED], "relative"), limit=EXACT))
    if scheme != "fp16":  # whose activations are rounded as well
        result.lines.append(line(f"{same} = {STRICT}", STATES, worst(found[same, STRICT], "relative"), limit=EXACT))
    if scheme == "fp32":
        result.lines.append(line(f"{HF} = {STRICT}", STATES, worst(found[HF, STRICT], "relative"), limit=EXACT))
    own = own_vectors(runs[STRICT], stored)
    apart = max(cosine_distance(one, other) for one, other in zip(own, runs[STRICT].vectors, strict=True))
    result.lines.append(
        line("mean, dense layers and length of its own states = strict", DISTANCE, apart, limit=DISTANCES["fp32"])
    )
    for test in (STRICT, *((SHIPPED,) if on_cpu else ())):
        result.lines.append(line(f"{HF} = {test}", DISTANCE, worst(found[HF, test], "cosine_distance"), limit=limit))
        result.lines.append(line(test, LENGTH, length_error(runs[test].vectors), limit=UNIT))
    text = found[HF, SHIPPED if on_cpu else STRICT][0]
    result.effect = {
        "tokens": text["case"],
        "positions": text["positions"],
        "relative_error": text["relative"],
        "cosine_distance": text["cosine_distance"],
    }
