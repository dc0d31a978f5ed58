"""The gate of a drafter: transformers' class = artifact, in logits and following states of several guesses in a row.

What a drafter guesses changes no text, only how fast it comes: limits of what rounding may cost are those of a model's
own, or wider.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.backends.base import Proof
from gemma_deploy.backends.onnxruntime.exact import exact
from gemma_deploy.backends.onnxruntime.options import GRAPH
from gemma_deploy.graph.contract import ENTERING, TOKEN_STATES
from gemma_deploy.machine import give_memory_back
from gemma_deploy.parity.drafter import DraftCase, DrafterSource, Steps, compared, draft_cases
from gemma_deploy.parity.gates import Line
from gemma_deploy.runtime.session import as_compiled, load_file, open_graph
from gemma_deploy.schemes import QUANTIZERS

if TYPE_CHECKING:
    from gemma_deploy.parity.compare import ParityResult
    from gemma_deploy.parity.metrics import Metrics

HF, STRICT, SHIPPED = "hf", "strict", "shipped"
EXACT = 1e-5  # of logits and states, float32 in another order of sums
# Mean KL in nats where a guess looks at some groups of tokens: rounded weights may choose another group, and all tokens
# of it change places with those that lie below. Tiny models, w8a16, 5 of 32 groups: 0.36 and 0.39; without groups 6e-4.
REGROUPED = 1.0


def prove_drafter(proof: Proof, result: ParityResult) -> None:
    """Compare and judge.

    Raises:
        DeployError: a source could not run.
    """
    scheme, opened = proof.manifest.scheme, proof.checkpoint
    cases = draft_cases(opened.config, proof.manifest.contract.context)
    sources, same = {HF: DrafterSource(opened)}, HF
    if scheme != "fp32":
        same = f"hf {scheme}"
        sources[same] = DrafterSource(ArtifactWeights(opened.config, proof.artifact, proof.manifest))
    runs: dict[str, list[Steps]] = {}
    for name, source in sources.items():
        proof.report(f"running {name}")
        runs[name] = source.run(cases)
        give_memory_back()
    for name in (STRICT, SHIPPED):
        proof.report(f"running {name}")
        runs[name] = _graph_run(proof, cases, strict=name == STRICT)
        give_memory_back()
    result.notes.append("a drafter is compared on keys, values and states drawn at random")
    for pair in dict.fromkeys([(same, STRICT), (HF, STRICT), (HF, SHIPPED)]):
        metrics, states = compared(runs[pair[0]], runs[pair[1]])
        result.measures += _rows(pair, cases, metrics)
        if pair == (same, STRICT) or scheme == "fp32":
            worst = max(one.relative for one in metrics)
            result.lines += [_line(pair, "relative error", worst, EXACT), _line(pair, "states", max(states), EXACT)]
        else:
            grouped = opened.config.drafting is not None and opened.config.drafting.centroids
            limit = REGROUPED if grouped else QUANTIZERS[scheme].kl_limit
            result.lines.append(_line(pair, "mean KL", max(one.kl_mean for one in metrics), limit))
        result.lines.append(_line(pair, "inf or NaN logits", sum(one.bad_test for one in metrics), 0))
        if pair == (HF, SHIPPED):
            first = metrics[0]
            result.effect = {"tokens": cases[0].name, "positions": first.positions, "relative_error": first.relative,
                             "kl_mean": first.kl_mean, "top1": first.top1}  # fmt: skip


def _graph_run(proof: Proof, cases: Sequence[DraftCase], *, strict: bool) -> list[Steps]:
    """Every guess of every case by the artifact's graph."""
    path = proof.artifact.resolve()
    model = load_file(path / GRAPH)
    if strict:
        with as_compiled(path / GRAPH):
            exact(model)
    session = open_graph(model, path, strict=strict)
    runs = []
    for case in cases:
        feeds = {**case.feeds(), "attention_mask": np.ones((1, case.positions), np.int64)}
        state, made = case.state, []
        for token in case.tokens:
            feeds[ENTERING] = np.concatenate([token, state])[None, None]
            logits, state = (one[0, 0] for one in session.run(["logits", TOKEN_STATES], feeds))
            made.append((logits, state))
        runs.append(made)
    return runs


def _rows(pair: tuple[str, str], cases: Sequence[DraftCase], metrics: Sequence[Metrics]) -> list[dict[str, Any]]:
    """Every figure of a pair, a row for each case."""
    names = {"reference": pair[0], "test": pair[1], "phase": "guesses"}
    return [{**names, "case": case.name, **one.to_json()} for case, one in zip(cases, metrics, strict=True)]


def _line(pair: tuple[str, str], name: str, value: float, limit: float) -> Line:
    return Line(" = ".join(pair), name, value, limit, value <= limit)
