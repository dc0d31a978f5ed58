"""The gate of a merge: the merged weights compute what PEFT computes with the adapters beside the base.

Both are transformers' own class in float32, streamed, on the cases of the artifact's gate, past the sliding window.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.names import HEAD
from gemma_deploy.parity.adapted import PeftSource
from gemma_deploy.parity.bisect import Divergence, torch_divergence
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.compare import ParityResult, Report, compare_sources, judged, measures_of
from gemma_deploy.parity.gates import MERGE, MERGE_LIMIT, relative
from gemma_deploy.parity.reference import TorchSource

log = logging.getLogger(__name__)


def prove_merge(merged: Checkpoint, cases: Sequence[Case], *, result: ParityResult, report: Report = log.debug) -> None:
    """Add the line of the merge to a result, and the module where the two part when it fails.

    Args:
        merged: a checkpoint that was opened with adapters; cases: what both run.
    """
    base, vocab_size = Checkpoint.open(merged.path), merged.config.vocab_size
    adapters = [(one.adapter.path, one.weight) for one in merged.adapters]
    peft, hf = PeftSource(base, adapters, vocab_size=vocab_size), TorchSource(merged, "hf", name=MERGE[1])
    sources = dict(zip(MERGE, (peft, hf), strict=True))
    found = compare_sources(sources, [MERGE], cases, vocab_size=vocab_size, report=report)
    (line,) = judged(relative(MERGE_LIMIT, MERGE), found)
    result.lines.append(line)
    result.measures += measures_of(found)
    if not line.passed and result.divergence is None:
        report("looking for the first module that was merged wrongly")
        result.divergence = _divergence(peft, hf, cases[0], line.value).to_json()


def _divergence(peft: PeftSource, hf: TorchSource, case: Case, error: float) -> Divergence:
    """The first module whose output differs; where none does before the head, and an adapter is about it, the head.

    Args:
        error: of the logits.
    """
    found = torch_divergence(peft, hf, case, tolerance=MERGE_LIMIT)
    assert found is not None  # both have modules
    if found.error <= MERGE_LIMIT and peft.changes_vocabulary:
        return replace(found, module=HEAD, error=error)
    return found
