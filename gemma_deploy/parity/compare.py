"""Compares sources over all cases and judges the result; what is compared with what is said in prove.py.

For prefill and every decode step; see gates.py for the limits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import UsageError
from gemma_deploy.machine import give_memory_back
from gemma_deploy.parity.cases import Case, Sizes, make_cases, prompt_length
from gemma_deploy.parity.gates import Gate, Line, judge
from gemma_deploy.parity.metrics import Comparison, Metrics
from gemma_deploy.parity.sources import Counting, Features, LogitSource
from gemma_deploy.progress import counted
from gemma_deploy.reading import read_text, text_kind
from gemma_deploy.text import Tokenizer, has_tokenizer

log = logging.getLogger(__name__)
# Positions of a prompt that are compared, the last ones: the window bites there. More of text, whose mean KL is judged.
PROMPT_POSITIONS = {"text": 256, "random": 64}
BLOCK_BYTES = 64 << 20  # logits of one source; a larger block means fewer passes over the table
Report = Callable[[str], None]


@dataclass
class ParityResult:
    """What was compared and how it ended.

    Attributes:
        lines: the gates.
        measures: every metric of every comparison, case and phase, gated or not.
        notes: what a reader must know: skipped comparisons, windows not reached.
        effect: figures for the ledger.
        divergence: where the numbers first part, when a gate failed.
    """

    lines: list[Line] = field(default_factory=list)
    measures: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    effect: dict[str, Any] = field(default_factory=dict)
    divergence: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """Whether every gate passed; nothing compared is nothing proven."""
        return bool(self.lines) and all(line.passed for line in self.lines)

    def failures(self) -> list[str]:
        """The gates that failed, and where."""
        failed = [str(line) for line in self.lines if not line.passed]
        return failed + ([str(self.divergence["text"])] if self.divergence else [])

    @property
    def summary(self) -> str:
        """The result in one line."""
        if self.passed:
            return "passed  " + "; ".join(f"{line.comparison} {line.name} {line.value:.2g}" for line in self.lines)
        return "FAILED  " + "; ".join(self.failures())

    def to_json(self) -> dict[str, Any]:
        """For manifest and report."""
        return {
            "passed": self.passed,
            "summary": self.summary,
            "lines": [line.to_json() for line in self.lines],
            "notes": self.notes,
            "effect": self.effect,
            "divergence": self.divergence,
            "measures": self.measures,
        }


class PairMeasures:
    """Metrics of one reference and one tested source, by case and phase and over both phases."""

    def __init__(self) -> None:
        self.parts: dict[tuple[str, str], Comparison] = {}
        self.pools: dict[str, Comparison] = {}

    def add(self, case: Case, row: int, index: int, *, reference: np.ndarray, test: np.ndarray) -> None:
        """Compare the logits at a position of a row's sequence."""
        sequence = case.sequence(row)
        target = sequence[index + 1] if index + 1 < len(sequence) else None
        phase = "prefill" if index < len(case.prompts[row]) else "decode"
        for comparison in (
            self.parts.setdefault((case.name, phase), Comparison()),
            self.pools.setdefault(case.name, Comparison()),
        ):
            comparison.add(reference, test, target, row=row)

    def measured(self) -> dict[tuple[str, str], Metrics]:
        """(case, phase) -> metrics."""
        return {key: comparison.result() for key, comparison in self.parts.items()}

    def pooled(self) -> dict[str, Metrics]:
        """Metrics by case."""
        return {key: comparison.result() for key, comparison in self.pools.items()}


def compare_sources(
    sources: Mapping[str, LogitSource],
    pairs: Sequence[tuple[str, str]],
    cases: Sequence[Case],
    *,
    vocab_size: int,
    report: Report = log.debug,
) -> dict[tuple[str, str], PairMeasures]:
    """Run every source over the cases, one after the other, and compare pairs of them position by position."""
    features: dict[str, Features] = {}
    for name, source in sources.items():
        report(f"running {name}")
        if isinstance(source, Counting):
            source.progress = counted(report, source.unit)
        features[name] = source.run(cases)
        give_memory_back()
    report("comparing logits")
    found = {pair: PairMeasures() for pair in pairs}
    step = max(1, BLOCK_BYTES // (4 * vocab_size))
    tick, done, kinds = counted(report, "positions"), 0, compared_positions(cases)
    total = sum(len(positions) for _, positions in kinds)
    for prompt_end, positions in kinds:
        for start in range(0, len(positions), step):
            block = positions[start : start + step]
            _compare_block(sources, features, found, cases, block, prompt_end)
            give_memory_back()
            done += len(block)
            if tick is not None:
                tick(done, total)
    return found


Position = tuple[int, int, int]  # case, row, index in the row's sequence


def compared_positions(cases: Sequence[Case]) -> tuple[tuple[bool, list[Position]], tuple[bool, list[Position]]]:
    """All but the last positions of prompts, then those: an artifact has a graph of its own for them."""
    ends, others = [], []
    for c, case in enumerate(cases):
        for row, prompt in enumerate(case.prompts):
            end = len(prompt) - 1
            first = max(0, len(prompt) - PROMPT_POSITIONS[case.name])
            ends.append((c, row, end))
            others += [(c, row, index) for index in range(first, len(case.sequence(row))) if index != end]
    return (False, others), (True, ends)


def _compare_block(
    sources: Mapping[str, LogitSource],
    features: Mapping[str, Features],
    found: Mapping[tuple[str, str], PairMeasures],
    cases: Sequence[Case],
    positions: Sequence[Position],
    prompt_end: bool,
) -> None:
    """Some positions of any rows; a source that computes only the last ones is compared where it does."""
    logits: dict[str, dict[Position, np.ndarray]] = {}
    for name, source in sources.items():
        rows = {at: _features_at(features[name], cases, at) for at in positions}
        there = {at: row for at, row in rows.items() if row is not None}
        made = source.head(np.stack(list(there.values())), prompt_end) if there else ()
        logits[name] = dict(zip(there, made, strict=True))
    for (reference, test), pair in found.items():
        for at in positions:
            if at in logits[reference] and at in logits[test]:
                pair.add(cases[at[0]], at[1], at[2], reference=logits[reference][at], test=logits[test][at])


def _features_at(features: Features, cases: Sequence[Case], position: Position) -> np.ndarray | None:
    """Features of one position, None where the source does not compute it."""
    c, row, index = position
    there = features[c][row]
    skipped = len(cases[c].sequence(row)) - len(there)
    return there[index - skipped] if index >= skipped else None


def judged(gates: Sequence[Gate], found: Mapping[tuple[str, str], PairMeasures]) -> list[Line]:
    """Apply gates to what was compared; a mean over text is taken over random tokens where there is no text."""
    lines = []
    for gate in gates:
        pair = found[gate.pair]
        cases = {case for case, _ in pair.parts}
        gate = gate if cases & set(gate.cases) else replace(gate, cases=tuple(cases))
        lines.append(judge(gate, pair.measured(), pair.pooled()))
    return lines


def cases_for(
    checkpoint: Checkpoint,
    sizes: Sizes,
    text: str | Path | None,
    *,
    prompt_tokens: int,
    decode_tokens: int,
    notes: list[str],
) -> list[Case]:
    """Cases that fit the artifact; what they do not cover goes into `notes`."""
    length, sentence = prompt_length(checkpoint.config, sizes.prefill, prompt_tokens)
    steps = min(decode_tokens, sizes.context - sizes.prefill)
    notes += [sentence] if sentence else []
    if steps < decode_tokens:
        notes.append(f"{steps} decode steps instead of {decode_tokens}: the context has no room for more after prefill")
    tokens = text_tokens(checkpoint, text, sizes.batch * (length + steps), notes=notes)
    if tokens is not None and len(tokens) < steps + 2:
        raise UsageError(
            f"has {len(tokens)} tokens, too few for {steps} decode steps",
            where=str(text),
            expected=f"a text of at least {length + steps} tokens",
            next_step="give a longer text, or fewer decode steps (--decode-tokens; parity.decode_tokens in a recipe)",
        )
    return make_cases(checkpoint.config, batch=sizes.batch, length=length, steps=steps, text=tokens)


def text_tokens(
    checkpoint: Checkpoint, text: str | Path | None, wanted: int, *, notes: list[str]
) -> Sequence[int] | None:
    """Tokens of the text without BOS, about as many as wanted; None when the checkpoint has no tokenizer."""
    from gemma_deploy.calibration.sources import SOURCES

    if not has_tokenizer(checkpoint):
        if text is not None:
            raise UsageError(
                "cannot be tokenized: the checkpoint has no tokenizer",
                where=str(text),
                next_step=f"put tokenizer.json into {checkpoint.path}, or give no text",
            )
        notes.append("the checkpoint has no tokenizer: compared on random tokens alone")
        return None
    if text is not None:
        whole = read_text(text, text_kind("parity.text or --text"))
    else:
        source = SOURCES["c4"]
        whole = "\n\n".join(islice(source.texts(source.sample), 1 + wanted // 16))
    limit = 16 * wanted + 4096  # characters; no tokenizer of this family makes fewer tokens of real text
    ids = Tokenizer.of(checkpoint).encode_more(whole[:limit])
    give_memory_back()  # 200 MiB of a vocabulary of 262,144
    return ids


def measures_of(found: Mapping[tuple[str, str], PairMeasures]) -> list[dict[str, Any]]:
    """Every metric there is, as plain rows."""
    rows = []
    for (reference, test), pair in found.items():
        for (case, phase), metrics in pair.measured().items():
            rows.append({"reference": reference, "test": test, "case": case, "phase": phase, **metrics.to_json()})
    return rows


def effect_of(pair: PairMeasures, cases: Sequence[Case]) -> dict[str, Any]:
    """The figures for the ledger: artifact against transformers, on text where there is some."""
    metrics = pair.pooled()[cases[0].name]
    figures = {
        "tokens": cases[0].name,
        "positions": metrics.positions,
        "relative_error": metrics.relative,
        "kl_mean": metrics.kl_mean,
        "top1": metrics.top1,
        "perplexity_change": metrics.ppl_delta,
        "perplexity_change_error": metrics.ppl_error,
    }
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in figures.items()}
