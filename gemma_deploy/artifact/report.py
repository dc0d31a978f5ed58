"""report.html: is it right, how large, how far from the reference; one self-contained page, the verdict first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.pages import gate_values, rendered
from gemma_deploy.artifact.plots import range_plot, sensitivity_plot, size_plot, sqnr_plot
from gemma_deploy.calibration.words import calibration_sentence
from gemma_deploy.names import FP16_MAX, LAYERS, MIB
from gemma_deploy.params.table import lowest_sqnr
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.tables import figure
from gemma_deploy.writing import write_text

FP16_MIN = 2.0**-24  # the smallest float16 above zero: a tensor of zeros has that much headroom
REPORT = "report.html"
TEXT_HEADINGS = ("text", "windows", "against", "perplexity", "of the reference", "mean KL, nats", "same first token")
# How the ledger's figures are called, and their units.
EFFECTS = {
    "tokens": ("on", ""),
    "case": ("on", ""),
    "positions": ("positions", ""),
    "relative_error": ("relative error", ""),
    "cosine_distance": ("largest cosine distance", ""),
    "kl_mean": ("mean KL", " nats"),
    "top1": ("same first token", "%"),
    "overturned": ("largest lead overturned", ""),
    "perplexity_change": ("perplexity change", "%"),
    "perplexity_change_error": ("its standard error", "%"),
    "lowest_sqnr_db": ("lowest SQNR of a matrix", " dB"),
    "lowest_sqnr_tensor": ("which is", ""),
    "lowest_output_sqnr_db": ("lowest SQNR of what a linear gives", " dB"),
    "lowest_output_sqnr_tensor": ("which is", ""),
    "activation_noise_db": ("noise of rounded activations", " dB"),
    "loss_to_round_to_nearest": ("loss, beside rounding to nearest", "%"),
    "tensors": ("tensors", ""),
    "largest_exponent": ("largest exponent", ""),
    "largest_exponent_tensor": ("which is", ""),
}


def write_report(folder: Path, manifest: Manifest) -> Path:
    """Write report.html beside the manifest."""
    path = folder / REPORT
    write_text(path, report_page(manifest))
    return path


def report_page(manifest: Manifest, results: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page.

    Args:
        results: of `gemma-deploy eval`, as eval.json holds them.
    """
    rescaling, parity, losses = manifest.rescaling or Rescaling(), manifest.parity, manifest.sensitivity
    absmax: Mapping[str, float] = rescaling.absmax
    ranges_on = "calibration text"
    measured = [result for result in results if result.get("activation_absmax")]
    if not absmax and measured:
        absmax, ranges_on = measured[-1]["activation_absmax"], f"{measured[-1]['settings']['text']} (eval)"
    gate = gate_values(parity, parity.measures) if parity else {"gate": (), "measures": ()}
    graphs = tuple(manifest.op_census)
    return rendered(
        "report.html.j2",
        m=manifest,
        **gate,
        positions=parity.effect.get("positions") if parity and manifest.model.sentence is None else None,
        positions_of=parity.effect.get("tokens") if parity else None,
        facts=_facts(manifest),
        use=_use(manifest),
        not_for=manifest.contract.not_for,
        results=results,
        text_headings=TEXT_HEADINGS,
        texts=[_text_row(result) for result in results if result["task"] == "ppl"],
        exams=[_exam(result) for result in results if result["task"] == "ceval"],
        sizes=size_plot(manifest.params),
        sqnr=sqnr_plot(manifest.params),
        calibrated=manifest.whole_scheme.calibrated,
        sensitivity=sensitivity_plot(losses.layers if losses else ()),
        table_alone=f"{figure(losses.table)} nats" if losses and losses.table is not None else "",
        sensitive=[
            (str(row["layer"]), figure(row["kl"]), "-" if row["sqnr_db"] is None else figure(row["sqnr_db"]),
             row["linear"])
            for row in sensitive_rows(manifest)
        ],
        ranges=range_plot(absmax),
        ranges_on=ranges_on,
        headroom=[
            (row["tensor"], figure(row["largest"]), row["layer"], row["divided"],
             f"{figure(row['headroom'])} x" if row["headroom"] else "float32")
            for row in headroom_rows(rescaling)
        ],
        ledger=[(entry.what, entry.where, entry.why, effect_text(entry.effect)) for entry in manifest.ledger],
        parts=_parts(manifest),
        stages=_stages(manifest),
        op_headings=("operator", *graphs),
        ops=[
            (op, *(str(manifest.op_census[graph].get(op, 0)) for graph in graphs))
            for op in sorted({op for census in manifest.op_census.values() for op in census})
        ],
        made_with=", ".join(f"{tool} {version}" for tool, version in manifest.tool.items()),
    )  # fmt: skip


def effect_text(effect: Mapping[str, Any]) -> str:
    """Figures of the ledger for people: `mean KL 0.00231 nats, same first token 97.4%`."""
    said = []
    for key in sorted(effect, key=lambda key: list(EFFECTS).index(key) if key in EFFECTS else len(EFFECTS)):
        value = effect[key]
        name, unit = EFFECTS.get(key, (key.replace("_", " "), ""))
        if isinstance(value, bool) or not isinstance(value, int | float):
            text = "no number" if value is None else str(value)
        else:
            text = f"{100 * value:.3g}%" if unit == "%" else f"{figure(value)}{unit}"
        said.append(f"{name} {text}")
    return ", ".join(said)


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    """What it is, at a glance."""
    contract, model, recipe = manifest.contract, manifest.model, manifest.recipe
    size = sum(facts.bytes for facts in manifest.files.values()) or sum(row.nbytes for row in manifest.params)
    lengths = f"{contract.prefill} of a prompt, {contract.context} in all, batch {contract.batch}"
    if contract.dynamic:
        lengths += " (any batch; these are the largest lengths)"
    if model.sentence is not None:
        rows = "any batch" if contract.dynamic else f"padded to that, batch {contract.batch}"
        lengths = f"{contract.context} of a text at most, {rows}"
    facts = [
        ("model", f"{model.model_type}, {model.num_hidden_layers} layers"),
        ("weights", manifest.scheme + (", int8 KV cache" if manifest.int8_cache else "")),
        ("back end", recipe.backend.type),
        ("size", f"{figure(size / MIB)} MiB"),
        ("tokens", lengths),
        ("checkpoint", f"{manifest.checkpoint.path} ({manifest.checkpoint.format})"),
        ("fingerprint", manifest.checkpoint.fingerprint[:16]),
    ]
    if manifest.calibration:
        facts.append(("calibrated on", calibration_sentence(manifest.calibration)))
    return facts


def _use(manifest: Manifest) -> str:
    """What a program that opens the graphs itself must know."""
    if manifest.model.sentence is not None:
        return (
            "An encoder: texts with their prompt, and the tokens that tokenizer.json puts before and behind them; "
            "padding on either side. What the graph takes and gives is listed by gemma-deploy inspect."
        )
    if manifest.model.drafting is not None:
        return "A drafter: gemma-deploy run TARGET --draft gives it to the model that it guesses for."
    bos = (manifest.model.model_extra or {}).get("bos_token_id")
    if "genai_config.json" in manifest.files or manifest.kernels or manifest.contract.logits:
        return f"In onnxruntime-genai, put BOS (id {bos}) in front of every prompt yourself: its tokenizer puts none."
    return (
        f"Prompts begin with BOS (id {bos}) and are padded on the left to {manifest.contract.prefill} tokens; "
        "what the graphs take and give is listed by gemma-deploy inspect."
    )


def _text_row(result: Mapping[str, Any]) -> tuple[str, ...]:
    """A perplexity under `TEXT_HEADINGS`."""
    settings, against = result["settings"], result["against"]
    other = (_plus(result, "perplexity_reference"), figure(result["kl_mean"])) if against else ("", "")
    top1 = "-" if not against or result["top1"] is None else f"{result['top1']:.2%}"
    beside = against["path"] if against else ""
    if against and against.get("adapter"):
        beside += f" with {against['adapter']} in peft"
    text = settings["text"] + _with_adapter(settings)
    return (text, settings["windowing"], beside, _plus(result, "perplexity"), *other, top1)


def _with_adapter(settings: Mapping[str, Any]) -> str:
    """Where an adapter was computed beside the weights, which."""
    return f", with the adapter {settings['adapter']}" if settings.get("adapter") else ""


def _exam(result: Mapping[str, Any]) -> dict[str, Any]:
    """A sentence about an exam, and a row for each subject."""
    settings = result["settings"]
    said = (
        f"C-Eval{_with_adapter(settings)}, {settings['split']}, {settings['shots']}-shot, "
        f"{result['questions']} questions of {len(result['subjects'])} subjects: accuracy {_plus(result, 'accuracy')}, "
        f"mean of the subjects {_plus(result, 'average_over_subjects')}"
    )
    if result["against"]:
        said += (
            f"; {result['against']['path']} on the same questions {figure(result['reference']['accuracy'])}, "
            f"the same choice in {figure(result['same_choice'])}"
        )
    rows = [
        (name, figure(one["questions"]), figure(one["accuracy"]), figure(one["accuracy_error"]))
        for name, one in result["subjects"].items()
    ]
    return {"sentence": f"{said}.", "rows": rows}


def _plus(result: Mapping[str, Any], key: str) -> str:
    """A figure and its standard error."""
    value, error = result[key], result[f"{key}_error"]
    if value is None:
        return "-"
    # Not three digits: two perplexities may differ in the fifth.
    return f"{value:.3f} \u00b1 {'-' if error is None else figure(error)}"


def _parts(manifest: Manifest) -> list[tuple[str, ...]]:
    """The parts of a divided artifact, a row each."""
    rows: list[tuple[str, ...]] = []
    for part in manifest.parts:
        extra, (start, stop) = part.contract.model_extra or {}, part.layers
        takes = "input_ids" if extra["embeds"] else "inputs_embeds"
        gives = "logits" if extra["heads"] else "hidden_states"
        rows.append((part.folder, f"{start} to {stop - 1}", f"{part.rank} of {part.ranks}", takes, gives))
    return rows


def _stages(manifest: Manifest) -> list[tuple[str, ...]]:
    """Seconds and peak memory of each stage of the compile, a row each."""
    return [
        (one.name, f"{figure(one.seconds)} s", f"{one.peak_rss_bytes / MIB:,.0f} MiB",
         f"{figure(one.bytes / MIB)} MiB" if one.bytes else "", "was done" if one.skipped else "")
        for one in manifest.stages
    ]  # fmt: skip


def sensitive_rows(manifest: Manifest, most: int = 8) -> list[dict[str, Any]]:
    """The layers that cost most alone, with the linear of each whose output suffers most."""
    losses = manifest.sensitivity.layers if manifest.sensitivity else ()
    rows = []
    for layer in sorted(range(len(losses)), key=lambda each: -losses[each])[:most]:
        prefix = f"model.layers.{layer}."
        own = [row for row in manifest.params if row.name.startswith(prefix)]
        worst = lowest_sqnr(own)
        linear = "" if worst is None else worst.name.removeprefix(prefix).removesuffix(".weight")
        db = None if worst is None else worst.sqnr_db
        rows.append({"layer": layer, "kl": losses[layer], "sqnr_db": db, "linear": linear})
    return rows


def headroom_rows(rescaling: Rescaling) -> list[dict[str, Any]]:
    """One row for each kind of tensor: largest magnitude, its layer, divisors, least headroom (None where float32)."""
    kinds: dict[str, list[str]] = {}
    for point in rescaling.absmax:
        layer = point.startswith(LAYERS)
        kinds.setdefault(point.split(".", 3)[3] if layer else point, []).append(point)
    rows = []
    for kind, points in kinds.items():
        top = max(points, key=lambda point: rescaling.absmax[point])
        divisors = sorted({2 ** rescaling.of(point) for point in points})
        stored = [rescaling.absmax[point] / 2 ** rescaling.of(point) for point in points]
        rows.append(
            {
                "tensor": "residual stream after a layer" if kind == "out" else kind,
                "largest": rescaling.absmax[top],
                "layer": top.split(".")[2] if top.startswith(LAYERS) else "",
                "divided": str(divisors[0]) if len(divisors) == 1 else f"{divisors[0]} to {divisors[-1]}",
                "headroom": None if rescaling.is_in_float32(top) else FP16_MAX / max(max(stored), FP16_MIN),
            }
        )
    return rows
