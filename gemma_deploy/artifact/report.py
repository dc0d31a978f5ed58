"""report.html: what was built, how large, how far from the reference, in one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.plots import range_plot, sensitivity_plot, sqnr_plot
from gemma_deploy.params.table import lowest_sqnr
from gemma_deploy.quantization.rescaling import FP16_MAX, Rescaling
from gemma_deploy.writing import write_text

FP16_MIN = 2.0**-24  # the smallest float16 above zero: a tensor of zeros has that much headroom
MIB = 1 << 20
REPORT = "report.html"

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ m.name }}</title>
<style>
body {font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #222}
table {border-collapse: collapse; margin: .5rem 0 1.5rem} td, th {border-bottom: 1px solid #ddd; padding: .2rem .8rem;
text-align: left; vertical-align: top} td.n {text-align: right; font-variant-numeric: tabular-nums}
.ok {color: #176d2c} .bad {color: #b00020; font-weight: 600} code {font-size: 90%}
</style></head><body>
<h1>{{ m.name }}</h1>
<p>{{ m.model.model_type }}, {{ m.model.num_hidden_layers }} layers,
{{ m.scheme }}{{ ', int8 KV cache' if m.int8_cache }}, prefill {{ m.contract.prefill }},
context {{ m.contract.context }}, batch {{ m.contract.batch }}
{{- ' (dynamic: any batch, these are the largest lengths)' if m.contract.dynamic }};
checkpoint <code>{{ m.checkpoint.path }}</code>
({{ m.checkpoint.format }}, fingerprint <code>{{ m.checkpoint.fingerprint[:16] }}</code>).</p>
<h2>Parity</h2>
{% if m.parity %}<p class="{{ 'ok' if m.parity.passed else 'bad' }}">{{ 'passed' if m.parity.passed else 'FAILED' }}</p>
<table><tr><th>comparison</th><th>measure</th><th>value</th><th>limit</th><th></th></tr>
{% for line in m.parity.lines %}<tr><td>{{ line.comparison }}</td><td>{{ line.name }}</td>
<td class="n">{{ line.value }}</td><td class="n">{{ line.limit }}</td>
<td class="{{ 'ok' if line.passed else 'bad' }}">{{ 'ok' if line.passed else 'FAILED' }}</td></tr>{% endfor %}</table>
{% for note in m.parity.notes %}<p>{{ note }}</p>{% endfor %}
{% if m.parity.divergence %}<p class="bad">{{ m.parity.divergence.text }}</p>{% endif %}
{% else %}<p class="bad">not run: nothing is proven about this artifact</p>{% endif %}
{% if results %}<h2>Evaluation</h2>
{% for r in results if r.task == 'ppl' %}{% if loop.first %}
<table><tr><th>text</th><th>windows</th><th>against</th><th>perplexity</th><th>of the reference</th>
<th>mean KL, nats</th><th>top-1</th></tr>{% endif %}
<tr><td>{{ r.settings.text }}</td><td>{{ r.settings.windowing }}</td><td>{{ r.against.path if r.against }}</td>
<td class="n">{{ r.perplexity | given('%.4f') }} &plusmn; {{ r.perplexity_error | given('%.3f') }}</td>
<td class="n">{% if r.against %}{{ r.perplexity_reference | given('%.4f') }} &plusmn;
{{ r.perplexity_reference_error | given('%.3f') }}{% endif %}</td>
<td class="n">{{ r.kl_mean | given('%.3g') if r.against }}</td>
<td class="n">{{ r.top1 | given('%.4f') if r.against }}</td></tr>
{% if loop.last %}</table>{% endif %}{% endfor %}
{% for r in results if r.task == 'ceval' %}
<p>C-Eval, {{ r.settings.split }}, {{ r.settings.shots }}-shot, {{ r.questions }} questions of
{{ r.subjects | length }} subjects: accuracy {{ r.accuracy | given('%.3f') }} &plusmn;
{{ r.accuracy_error | given('%.3f') }}, mean of the subjects {{ r.average_over_subjects | given('%.3f') }} &plusmn;
{{ r.average_over_subjects_error | given('%.3f') }}{% if r.against %}; {{ r.against.path }} on the same questions
{{ r.reference.accuracy | given('%.3f') }}, the same choice in {{ r.same_choice | given('%.3f') }}{% endif %}.</p>
<table><tr><th>subject</th><th>questions</th><th>accuracy</th><th>standard error</th></tr>
{% for name, s in r.subjects.items() %}<tr><td>{{ name }}</td><td class="n">{{ s.questions }}</td>
<td class="n">{{ s.accuracy | given('%.3f') }}</td><td class="n">{{ s.accuracy_error | given('%.3f') }}</td></tr>
{% endfor %}</table>{% endfor %}{% endif %}
<h2>Ledger: where it may differ from the reference</h2>
<table><tr><th>what</th><th>where</th><th>why</th><th>measured effect</th></tr>
{% for e in m.ledger %}<tr><td>{{ e.what }}</td><td>{{ e.where }}</td><td>{{ e.why }}</td>
<td>{% for k, v in e.effect.items() %}{{ k }} {{ v }}<br>{% endfor %}</td></tr>{% endfor %}</table>
{% if m.parts %}<h2>Parts</h2>
<table><tr><th>directory</th><th>layers</th><th>rank</th><th>takes</th><th>gives</th></tr>
{% for p in m.parts %}<tr><td><code>{{ p.folder }}</code></td><td>{{ p.layers[0] }} to {{ p.layers[1] - 1 }}</td>
<td>{{ p.rank }} of {{ p.ranks }}</td>
<td>{{ 'input_ids' if p.contract.embeds else 'inputs_embeds' }}</td>
<td>{{ 'logits' if p.contract.heads else 'hidden_states' }}</td></tr>{% endfor %}</table>{% endif %}
<h2>Size</h2>
<table><tr><th>kind</th><th>tensors</th><th>MiB</th></tr>
{% for kind, count, mib in sizes %}<tr><td>{{ kind }}</td><td class="n">{{ count }}</td>
<td class="n">{{ '%.2f' | format(mib) }}</td></tr>{% endfor %}</table>
{% if headroom %}<h2>Headroom of float16</h2>
<p>Largest magnitudes on calibration text, what they are divided by, and how far below 65504 they are then stored.
{%- if m.rescaling.wide %} In float32 instead: {{ m.rescaling.wide | join(', ') }}.{% endif %}</p>
<table><tr><th>tensor</th><th>largest</th><th>layer</th><th>divided by</th><th>least headroom</th></tr>
{% for row in headroom %}<tr><td>{{ row.tensor }}</td><td class="n">{{ '%.4g' | format(row.largest) }}</td>
<td class="n">{{ row.layer }}</td><td class="n">{{ row.divided }}</td>
<td class="n">{{ '%.3g' | format(row.headroom) if row.headroom else 'float32' }}</td></tr>{% endfor %}</table>
{% endif %}
{% if sensitivity %}<h2>Sensitivity</h2>
<p>Mean KL of the logits to float32 in nats a token, {{ sensitivity.tokens }} tokens of calibration text, when one layer
alone is quantized{% if sensitivity.table is not none %}; the token table alone:
{{ '%.3g' | format(sensitivity.table) }}{% endif %}.</p>
{{ sensitivity_picture | safe }}
<table><tr><th>layer</th><th>mean KL</th><th>lowest output SQNR, dB</th><th>of</th></tr>
{% for row in sensitive %}<tr><td class="n">{{ row.layer }}</td><td class="n">{{ '%.3g' | format(row.kl) }}</td>
<td class="n">{{ '%.2f' | format(row.sqnr_db) if row.sqnr_db is not none else '-' }}</td>
<td>{{ row.linear }}</td></tr>{% endfor %}</table>{% endif %}
{% if sqnr %}<h2>Weight SQNR per layer</h2>{{ sqnr | safe }}{% endif %}
{% if ranges %}<h2>Activation ranges per layer</h2>
<p>Largest magnitudes in float32, on {{ ranges_on }}.</p>{{ ranges | safe }}{% endif %}
<h2>Operators</h2>
<table><tr><th>operator</th>{% for g in m.op_census %}<th>{{ g }}</th>{% endfor %}</tr>
{% for op in ops %}<tr><td>{{ op }}</td>{% for g in m.op_census %}<td class="n">{{ m.op_census[g].get(op, 0) }}</td>
{% endfor %}</tr>{% endfor %}</table>
<h2>Stages</h2>
<table><tr><th>stage</th><th>seconds</th><th>peak RSS MiB</th><th>MiB written</th><th></th></tr>
{% for s in m.stages %}<tr><td>{{ s.name }}</td><td class="n">{{ '%.2f' | format(s.seconds) }}</td>
<td class="n">{{ '%.0f' | format(s.peak_rss_bytes / mib) }}</td><td class="n">{{ '%.1f' | format(s.bytes / mib) }}</td>
<td>{{ 'was done' if s.skipped else '' }}</td></tr>{% endfor %}</table>
<h2>Made with</h2><p>{% for k, v in m.tool.items() %}{{ k }} {{ v }}{{ ', ' if not loop.last }}{% endfor %}</p>
</body></html>
"""


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
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["given"] = lambda value, shape: "-" if value is None else shape % value
    rescaling = manifest.rescaling or Rescaling()
    absmax: Mapping[str, float] = rescaling.absmax
    ranges_on = "calibration text"
    measured = [result for result in results if result.get("activation_absmax")]
    if not absmax and measured:
        absmax, ranges_on = measured[-1]["activation_absmax"], f"{measured[-1]['settings']['text']} (eval)"
    page: str = environment.from_string(TEMPLATE).render(
        m=manifest,
        sizes=_sizes(manifest),
        ops=sorted({op for census in manifest.op_census.values() for op in census}),
        mib=MIB,
        sensitivity=manifest.sensitivity,
        sensitivity_picture=sensitivity_plot(manifest.sensitivity.layers if manifest.sensitivity else ()),
        sensitive=sensitive_rows(manifest),
        sqnr=sqnr_plot(manifest.params),
        ranges=range_plot(absmax),
        ranges_on=ranges_on,
        results=results,
        headroom=headroom_rows(rescaling),
    )
    return page


def _sizes(manifest: Manifest) -> list[tuple[str, int, float]]:
    groups: dict[str, list[int]] = {}
    for row in manifest.params:
        name = row.name
        kind = "token table" if "embed_tokens" in name else "LM head" if name.startswith("lm_head") else "linears"
        kind = "norms" if "norm" in name else "rotary tables" if "rotary_emb" in name else kind
        kind = "attention scale factors" if name.endswith(".scaling") else kind
        groups.setdefault(f"{kind}, {row.dtype}", []).append(row.nbytes)
    return [(kind, len(sizes), sum(sizes) / MIB) for kind, sizes in sorted(groups.items())]


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
        layer = point.startswith("model.layers.")
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
                "layer": top.split(".")[2] if top.startswith("model.layers.") else "",
                "divided": str(divisors[0]) if len(divisors) == 1 else f"{divisors[0]} to {divisors[-1]}",
                "headroom": None if rescaling.is_wide(top) else FP16_MAX / max(max(stored), FP16_MIN),
            }
        )
    return rows
