"""A plan for people, for programs, and as the recipe to start with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gemma_deploy.machine import gib
from gemma_deploy.planning.choices import OWN_DIVISION, Choice, recipe_text
from gemma_deploy.planning.planner import Plan, Row
from gemma_deploy.planning.speeds import unmeasured
from gemma_deploy.tables import figure

GB = 1e9
MODEL_OF_KL = "the real Gemma 3 270M on WikiText-2"
HEADINGS = ("back end", "precision", "devices", "weights", "cache", "on each", "fits", "prefill", "decode", "KL")


def to_json(plan: Plan) -> dict[str, Any]:
    """Plain values: device, lengths, every row, the proposed one and its recipe."""
    proposed = plan.proposed
    return {
        "checkpoint": str(plan.checkpoint.path),
        "model_type": plan.checkpoint.config.model_type,
        "device": plan.device.model_dump(),
        "prompt": plan.wanted.prompt,
        "context": plan.wanted.context,
        "batch": plan.wanted.batch,
        "kl_of": MODEL_OF_KL,
        "rows": [row.to_json() for row in plan.rows],
        "proposed": None if proposed is None else proposed.to_json()["choice"],
        "recipe": None if proposed is None else recipe_of(plan),
    }


def recipe_of(plan: Plan) -> str:
    """The recipe of what is proposed, with a line that says what it is for."""
    assert plan.proposed is not None
    choice, device = plan.proposed.choice, plan.device
    head = (
        f"# Goal: {plan.checkpoint.path.name} on {device.name} ({choice.precision}), as `gemma-deploy plan` proposes.\n"
    )
    return head + recipe_text(plan.checkpoint, choice, plan.wanted)


def table_rows(plan: Plan) -> list[list[str]]:
    """A row of cells for each choice that is built."""
    return [_cells(row) for row in plan.rows if not row.refused]


def _cells(row: Row) -> list[str]:
    choice, sizes, speed = row.choice, row.sizes, row.speed
    assert sizes is not None
    assert speed is not None
    sign = "<= " if speed.is_bound else ""
    numbers = [f"{sign}{figure(one)}" if one is not None else "?" for one in (speed.prefill_tok_s, speed.decode_tok_s)]
    fits = {True: "yes", False: "no", None: "?"}[row.fits]
    kl = "?" if row.kl is None else "0" if not row.kl else figure(row.kl)
    sizes_text = [f"{sizes.all_weights / GB:.2f}", f"{sizes.cache / GB:.2f}", f"{sizes.total / GB:.2f}"]
    return [choice.backend, choice.precision, divided(choice), *sizes_text, fits, *numbers, kl]


def divided(choice: Choice) -> str:
    """`1`, `4: tp 4`, `2: cut at 9`, `3: pp 3` of an engine that cuts a model itself."""
    words = [f"tp {choice.ranks}"] if choice.ranks > 1 else []
    if choice.points and not choice.in_recipe:
        return f"{choice.devices}: pp {choice.devices}"
    words += [f"cut at {', '.join(map(str, choice.points))}"] if choice.points else []
    return f"{choice.devices}: {'; '.join(words)}" if words else "1"


def lines(plan: Plan) -> Iterator[str]:
    """What stands below the table: units, what is a bound, what is refused, what to start with."""
    device, wanted = plan.device, plan.wanted
    room = "memory unknown" if device.room_bytes is None else f"{gib(device.room_bytes)} of each to be used"
    yield f"{device.name} ({device.what}): {device.count} of them, {room}"
    yield (
        f"GB of 10^9 bytes; a prompt of {wanted.prompt} tokens, a context of {wanted.context}, "
        f"{wanted.batch} at a time; prefill and decode in tokens/s, decode of all texts together"
    )
    yield f"KL: mean, nats a token, measured with {MODEL_OF_KL}; of this model `gemma-deploy eval` measures it"
    built = [row for row in plan.rows if not row.refused]
    if unmeasured(row.speed for row in built if row.speed is not None):
        yield "<=: no share of the device's rates was measured, so this is what bandwidth and operations allow at most"
    if any(row.speed is not None and row.speed.decode_tok_s is None for row in built):
        yield "?: the device file has no number for it (null)"
    for backend in dict.fromkeys(row.choice.backend for row in plan.rows):
        refused: dict[str, list[str]] = {}
        for row in plan.rows:
            if row.choice.backend == backend and row.refused:
                refused.setdefault(row.refused, []).append(row.choice.precision)
        for why, precisions in refused.items():
            yield f"left out: {backend}, {', '.join(precisions)}: {why}"
    if plan.proposed is None:
        yield "nothing fits: take more devices, a shorter --context, or a smaller model"
        return
    choice = plan.proposed.choice
    yield f"start with  {choice.backend}, {choice.precision}, devices {divided(choice)}"
    if choice.backend == OWN_DIVISION and choice.devices > 1:
        options = "--tensor-parallel-size" if choice.ranks > 1 else "--pipeline-parallel-size"
        yield f"and serve it with  gemma-deploy serve-command ARTIFACT {options} {choice.devices}"
