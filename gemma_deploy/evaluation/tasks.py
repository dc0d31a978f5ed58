"""The two tasks from request to result: everything that can be wrong is found before a model runs.

A result is plain JSON: `task`, `target`, `against`, `settings` (what was asked, text and windowing included), figures,
`notes` that a reader must know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_deploy.artifact.plots import ranges_of
from gemma_deploy.artifact.tools import tool_versions
from gemma_deploy.checkpoint import AdapterRef
from gemma_deploy.errors import UsageError
from gemma_deploy.evaluation import ceval, perplexity
from gemma_deploy.evaluation.models import Evaluated, open_model, reference_of, refuse_other_vocabularies
from gemma_deploy.evaluation.texts import ScoredWindows, make_windows, read_text, sha256_of_text
from gemma_deploy.machine import give_memory_back
from gemma_deploy.progress import Tick

NONE, CHECKPOINT = "none", "hf"
SEQLEN, WINDOWS = 512, 16


@dataclass(frozen=True)
class Comparison:
    """The model that is evaluated, and what it is compared with."""

    target: Evaluated
    reference: Evaluated | None = None

    @property
    def models(self) -> list[Evaluated]:
        """The reference first, where there is one."""
        return [self.target] if self.reference is None else [self.reference, self.target]

    @property
    def longest(self) -> int:
        """Tokens that all of them take as a prompt."""
        return min(model.longest for model in self.models)


@dataclass(frozen=True)
class TextRequest:
    """Perplexity: of which text (None: the bundled sample), how many windows (None: 16), of how many tokens."""

    text: Path | None = None
    windows: int | None = None
    seqlen: int | None = None


@dataclass(frozen=True)
class ExamRequest:
    """C-Eval: which archive (None: the bundled sample), split, examples, subjects (none: all), questions of each."""

    path: Path | None = None
    split: str = "val"
    shots: int = 5
    subjects: Sequence[str] = field(default_factory=tuple)
    limit: int | None = None


def open_pair(
    target: str,
    against: str | None,
    checkpoint: str | None,
    *,
    task: str,
    kernels: str | None = None,
    adapters: Sequence[AdapterRef] = (),
) -> Comparison:
    """Open what is evaluated.

    Args:
        against: "hf", the artifact's checkpoint; "none"; an artifact or a checkpoint. By default an artifact's
            perplexity is compared with its checkpoint, and nothing else with anything.
        checkpoint: where an artifact's checkpoint is now.
        kernels: of the target, see `open_model`.
        adapters: added to a checkpoint that is the target; computed beside the weights of an artifact that takes
            adapters; of any other artifact, where those are now that were merged into it.

    Raises:
        UsageError: the two do not go together; ArtifactError, CheckpointError: one of them is not there, or damaged.
    """
    opened = open_model(target, kernels=kernels, adapters=adapters)
    against = against or (CHECKPOINT if task == "ppl" and opened.artifact is not None else NONE)
    if adapters and opened.artifact is not None and opened.beside is None and against != CHECKPOINT:
        raise UsageError(
            "an artifact has its adapter inside, and nothing here reads it again",
            where=target,
            next_step="leave --adapter out, or name it with --against hf",
        )
    if against == NONE:
        return Comparison(opened)
    if against == CHECKPOINT:
        if opened.artifact is None:
            raise UsageError(
                "is a checkpoint, which transformers computes already",
                where=target,
                expected="--against with an artifact or another checkpoint",
                next_step="leave --against out",
            )
        return Comparison(opened, reference_of(opened, checkpoint, adapters))
    return Comparison(opened, open_model(against, opened.embed_scale))


def run_text(pair: Comparison, request: TextRequest, progress: Tick | None = None) -> dict[str, Any]:
    """Perplexity, and against a reference KL and top-1 agreement.

    Raises:
        UsageError: the text is missing or empty, the windows are too long, or vocabularies differ.
    """
    seqlen = min(SEQLEN, pair.longest) if request.seqlen is None else request.seqlen
    refuse_long_windows(seqlen, pair.longest)
    text, name = read_text(request.text)
    if pair.reference is not None:
        refuse_other_vocabularies(pair.target, pair.reference, text[:4096])
    encode, bos = pair.target.encoder()
    asked = WINDOWS if request.windows is None else request.windows
    windows = make_windows(text, encode, bos, count=asked, seqlen=seqlen, name=name)
    del encode
    give_memory_back()
    measured = perplexity.measure(pair.target, pair.reference, windows, progress=progress)
    return {
        **_head("ppl", pair),
        "settings": {**text_settings(text, name, windows), **_adapter(pair)},
        **measured.to_json(),
        "activation_absmax": _ranges(pair),
        "notes": text_notes(windows) + _range_notes(pair, seqlen),
    }


def run_exam(pair: Comparison, request: ExamRequest, progress: Tick | None = None) -> dict[str, Any]:
    """Accuracy on C-Eval, of two models on the same prompts.

    Returns:
        With `answers`, one entry a question, which `record` leaves out.

    Raises:
        UsageError: no such subject, or questions that do not fit; CalibrationError: the archive is damaged or lacks
            what was asked for.
    """
    chosen = ceval.read(request.path, request.split, request.shots, subjects=request.subjects, limit=request.limit)
    encode, bos = pair.target.encoder()
    asked = ceval.ask(chosen, encode, bos, longest=pair.longest, where=str(pair.target.path))
    if pair.reference is not None:
        del encode
        probe = "\n\n".join(row["question"] for _, rows in chosen.values() for row in rows[:1])
        refuse_other_vocabularies(pair.target, pair.reference, probe)
    give_memory_back()
    answered = ceval.answer(pair.models, asked, progress)
    test = len(pair.models) - 1
    result = {
        **_head("ceval", pair),
        "settings": {**exam_settings(request, chosen), **_adapter(pair)},
        **ceval.summary(answered, test),
        **prompts_digest(asked, request),
        "notes": exam_notes(asked, request, pair.longest),
    }
    if pair.reference is not None:
        result |= {"reference": ceval.summary(answered, 0), **ceval.agreement(answered)}
    return result | {"answers": [_answer(one, pair) for one in answered]}


def refuse_long_windows(seqlen: int, longest: int) -> None:
    """Refuse windows that do not fit into a prompt.

    Raises:
        UsageError: they are too long.
    """
    if seqlen > longest:
        raise UsageError(
            f"windows of {seqlen} tokens are longer than the {longest} that fit into a prompt",
            where="--seqlen",
            expected=f"2 to {longest}",
            next_step="use shorter windows, or compile with a longer first length in frontend.shape.input_ids",
        )


def text_settings(text: str, name: str, windows: ScoredWindows) -> dict[str, Any]:
    """What was scored."""
    return {
        "text": name,
        "text_sha256": sha256_of_text(text),
        "windows": len(windows.ids),
        "seqlen": max(map(len, windows.ids)),
        "windowing": str(windows),
    }


def exam_settings(request: ExamRequest, subjects: Iterable[str]) -> dict[str, Any]:
    """What was asked, of these subjects."""
    return {
        "archive": "bundled sample" if request.path is None else str(request.path),
        "split": request.split,
        "shots": request.shots,
        "subjects": sorted(subjects) if request.subjects else "all",
        "limit": request.limit,
    }


def prompts_digest(asked: Sequence[ceval.Asked], request: ExamRequest) -> dict[str, Any]:
    """The prompts of an exam: how many lack examples, the longest, and what identifies all of them."""
    return {
        "prompts_with_fewer_shots": sum(one.shots < request.shots for one in asked),
        "longest_prompt_tokens": max(len(one.ids) for one in asked),
        "prompts_sha256": hashlib.sha256(repr([one.ids for one in asked]).encode()).hexdigest(),
    }


def exam_notes(asked: Sequence[ceval.Asked], request: ExamRequest, longest: int) -> list[str]:
    """What a reader of an accuracy must know.

    Args:
        longest: tokens of a prompt at most.
    """
    short = [one for one in asked if one.shots < request.shots]
    if not short:
        return []
    dropped = sum(request.shots - one.shots for one in short)
    return [
        f"{len(short)} of {len(asked)} prompts were longer than {longest} tokens: "
        f"{dropped} examples were left out, from the front"
    ]


def _head(task: str, pair: Comparison) -> dict[str, Any]:
    return {
        "task": task,
        "target": pair.target.to_json(),
        "against": None if pair.reference is None else pair.reference.to_json(),
        "tool": tool_versions(),
    }


def _adapter(pair: Comparison) -> dict[str, str]:
    """A setting where an adapter is computed beside the weights."""
    beside = pair.target.beside
    return {} if beside is None else {"adapter": beside.kept.name}


def _answer(one: ceval.Answered, pair: Comparison) -> dict[str, Any]:
    found = one.to_json(len(pair.models) - 1)
    return found if pair.reference is None else found | {"choice_of_reference": one.choice(0)}


def _ranges(pair: Comparison) -> dict[str, float]:
    """What transformers' model made on the way, for the report's picture."""
    for model in pair.models:
        absmax = getattr(model.source, "absmax", None)
        if absmax:
            return ranges_of(absmax)
    return {}


def text_notes(windows: ScoredWindows) -> list[str]:
    """What a reader of a perplexity must know."""
    if len(windows.ids) < windows.asked:
        return [f"the text has {windows.tokens} tokens: {len(windows.ids)} windows instead of {windows.asked}"]
    return []


def _range_notes(pair: Comparison, seqlen: int) -> list[str]:
    """A window no longer than the attention's never shows that it is wrong."""
    for model in pair.models:
        config = model.checkpoint.config if model.checkpoint is not None else None
        if config is not None and "sliding_attention" in config.layer_types and config.sliding_window is not None:
            if seqlen <= config.sliding_window:
                return [f"windows of {seqlen} tokens do not outgrow the sliding window ({config.sliding_window})"]
            return []
    return []
