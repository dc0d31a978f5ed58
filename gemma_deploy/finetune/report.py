"""run.json and report.html of a fine-tuning."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemma_deploy.artifact.charts import Chart, line_chart
from gemma_deploy.artifact.pages import rendered
from gemma_deploy.machine import gib
from gemma_deploy.tables import figure

if TYPE_CHECKING:
    from gemma_deploy.finetune.result import FinetuneResult
    from gemma_deploy.finetune.training import Outcome

MOST_POINTS = 120  # of a curve that is drawn; means of so many stretches of a longer one
SECONDS, PEAK = "step_seconds", "peak_rss_bytes"  # keys of a step's line in the log, as trainer.py writes them
PROMPT_SHOWN = 600  # last characters


def record(result: FinetuneResult, outcome: Outcome, *, request: Mapping[str, Any], recipe: str) -> dict[str, Any]:
    """What run.json holds: plain values."""
    steps = [one for one in outcome.log if "loss" in one]
    seconds = sum(one.get(SECONDS, 0.0) for one in steps)
    peak = max([outcome.peak_rss_bytes, *(int(one.get(PEAK, 0)) for one in steps)])
    return {
        "out": str(result.path),
        "request": dict(request),
        "steps": outcome.steps,
        "stopped_early": outcome.stopped_early,
        "trained_parameters": outcome.trainable,
        "parameters": outcome.parameters,
        "examples": _counts(result.examples),
        "held_out": None if result.held_out is None else _counts(result.held_out),
        "tokens_per_second": tokens_seen(steps, result) / seconds if seconds else None,
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "estimated_bytes": result.memory.total,
        "loss_before": outcome.loss_before,
        "loss_after": outcome.loss_after,
        "loss_merged": outcome.loss_merged,
        "perplexity_merged": perplexity(outcome.loss_merged),
        "perplexity_before": perplexity(outcome.loss_before),
        "perplexity_after": perplexity(outcome.loss_after),
        "samples": [vars(one) for one in outcome.samples],
        "log": outcome.log,
        "command": command(result, recipe),
    }


def tokens_seen(steps: Sequence[Mapping[str, Any]], result: FinetuneResult) -> float:
    """Tokens that went through the model in the steps of a log: epochs times the tokens of the data."""
    return result.examples.tokens * max((one.get("epoch", 0.0) for one in steps), default=0.0)


def command(result: FinetuneResult, recipe: str) -> str:
    """The command that compiles what was trained, or runs it beside the artifact it was trained on."""
    if result.base is not None:
        return f"gemma-deploy run {shlex.quote(result.base)} --adapter {shlex.quote(str(result.adapter))} -p TEXT"
    base = f"gemma-deploy compile {shlex.quote(recipe)}"
    if result.adapter is not None:
        return f"{base} -s frontend.adapter={shlex.quote(str(result.adapter))}"
    return f"{base} --checkpoint {shlex.quote(str(result.model))}"


def perplexity(loss: float | None) -> float | None:
    """Exp of a mean negative log likelihood in nats."""
    return None if loss is None else math.exp(loss) if loss < 700 else math.inf


def _counts(examples: Any) -> dict[str, int]:
    return {
        "examples": len(examples.rows),
        "tokens": examples.tokens,
        "learned_tokens": examples.learned,
        "cut": examples.cut,
        "dropped": examples.dropped,
        "longest": examples.longest,
    }


def page(said: Mapping[str, Any]) -> str:
    """The page of a run.

    Args:
        said: what `record` gave.
    """
    settings = said["request"]["settings"]
    before, after = said["perplexity_before"], said["perplexity_after"]
    rows = []
    if before is not None:
        rows = [
            ("loss on held-out answers, nats a token", f"{said['loss_before']:.4f}", f"{said['loss_after']:.4f}"),
            ("perplexity", figure(before), figure(after)),
        ]
        merged = said["loss_merged"]
        if merged is not None:
            rows.append(("loss if merged and quantized again", "-", f"{merged:.4f}"))
    return rendered(
        "finetune.html.j2",
        title=said["out"],
        headline=headline(said),
        facts=list(_facts(said)),
        notes=list(_notes(said)),
        losses=curves(said["log"]),
        headings=("on held-out examples", "before", "after"),
        rows=rows,
        samples=[
            (one["prompt"][-PROMPT_SHOWN:], one["wanted"], one["before"], one["after"]) for one in said["samples"]
        ],
        command=said["command"],
        settings=list(_flat(settings)),
    )


def headline(said: Mapping[str, Any]) -> str:
    """One sentence."""
    what = f"{said['steps']} steps of {said['request']['settings']['method']}"
    if said["perplexity_before"] is None:
        return f"{what}; nothing was held out to measure it on"
    return f"{what}: held-out perplexity {figure(said['perplexity_before'])} -> {figure(said['perplexity_after'])}"


def _facts(said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    counts = said["examples"]
    share = said["trained_parameters"] / max(1, said["parameters"])
    yield "data", f"{counts['examples']:,} examples, {counts['tokens']:,} tokens, {counts['learned_tokens']:,} learned"
    if said["held_out"]:
        yield (
            "held out",
            f"{said['held_out']['examples']:,} examples, {said['held_out']['learned_tokens']:,} answers' tokens",
        )
    yield "trained", f"{said['trained_parameters']:,} of {said['parameters']:,} numbers ({share:.2%})"
    if said["tokens_per_second"]:
        yield "speed", f"{figure(said['tokens_per_second'])} tokens/s, {figure(said['seconds'])} s in steps"
    yield "memory", f"peak {gib(said['peak_rss_bytes'])}, estimated {gib(said['estimated_bytes'])}"


def _notes(said: Mapping[str, Any]) -> Iterator[str]:
    counts = said["examples"]
    if counts["cut"]:
        longest = counts["longest"]
        yield f"{counts['cut']} examples were longer than max_length and cut; the longest had {longest} tokens."
    if counts["dropped"]:
        yield f"{counts['dropped']} of them were left out, as nothing of their answer was left."
    if said["stopped_early"]:
        yield "It ended before its number of steps: the held-out loss no longer fell, and the best weights were kept."


def curves(log: Sequence[Mapping[str, Any]]) -> Chart:
    """Loss over steps, in training and held out."""
    lines = {"training": "loss", "held out": "eval_loss"}
    values = {name: _thinned({int(one["step"]): float(one[key]) for one in log if key in one})
              for name, key in lines.items()}  # fmt: skip
    drawn = {name: line for name, line in values.items() if line}
    return line_chart(drawn, label="loss", unit="nats a token", across="step")


def _thinned(line: Mapping[int, float]) -> dict[int, float]:
    """Means of stretches of a long curve, at the last step of each."""
    steps = sorted(line)
    width = -(-len(steps) // MOST_POINTS)
    if width <= 1:
        return dict(line)
    found = {}
    for start in range(0, len(steps), width):
        part = steps[start : start + width]
        found[part[-1]] = sum(line[step] for step in part) / len(part)
    return found


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", "-" if value in (None, {}, []) else str(value)
