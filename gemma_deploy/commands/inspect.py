"""`gemma-deploy inspect`: what is in an artifact or a checkpoint; reads no weight."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_deploy.names import MANIFEST, MIB, PARAMETER_FILES
from gemma_deploy.options import NAME, adapter_option

if TYPE_CHECKING:
    from gemma_deploy.artifact.manifest import GraphRecord, Manifest
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.checkpoint import AdapterRef, Checkpoint, TensorInfo
    from gemma_deploy.checkpoint.sentence import SentenceHead

EPILOG = """\b
Examples:
  gemma-deploy inspect workspace/gemma-demo-int8-128-256
  gemma-deploy inspect /models/gemma-3-270m --params
  gemma-deploy inspect demo --json
"""


@click.command("inspect", epilog=EPILOG)
@click.argument("path", type=NAME)
@adapter_option("Of a checkpoint: show the model with it.")
@click.option("--params", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(path: str, adapter: tuple[AdapterRef, ...], params: bool, as_json: bool) -> None:
    """Show what is in PATH: an artifact, a checkpoint directory, a .gguf file, or `demo`.

    Exit 1 when files of an artifact are missing or cut short.
    """
    from gemma_deploy.artifact.check import file_problems, refuse
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.checkpoint import Checkpoint, resolve_checkpoint
    from gemma_deploy.reading import exists

    is_artifact = any(
        exists(Path(path) / name) for name in (MANIFEST, *PARAMETER_FILES)
    )  # those alone: an unfinished one
    artifact = Artifact.open(path) if is_artifact else None
    if artifact is not None:
        if adapter:
            raise click.UsageError("--adapter goes with a checkpoint; an artifact says what was added to it")
        manifest = artifact.manifest
        more = runtime_adapters(artifact) | encoder_facts(manifest.model.sentence) | kernel_facts(artifact)
        facts, tensors = artifact_facts(manifest) | more, manifest.table.to_json()
    else:
        checkpoint = Checkpoint.open(resolve_checkpoint(path), adapter, encoder=True)
        facts = checkpoint_facts(checkpoint) | encoder_facts(checkpoint.config.sentence)
        tensors = [
            {"name": one.name, "dtype": stored_as(checkpoint, one), "shape": list(one.shape), "nbytes": one.nbytes}
            for one in checkpoint.tensors.values()
        ]
    if as_json:
        click.echo(json.dumps(facts | ({"params": tensors} if params else {}), indent=1))
    else:
        _show(facts, tensors if params else [])
    if artifact is not None:  # the manifest is worth seeing when files of the artifact are not
        refuse(artifact, file_problems(artifact, hashes=False))


def artifact_facts(manifest: Manifest) -> dict[str, Any]:
    """The manifest without its longest parts, and sums over them."""
    from gemma_deploy.artifact.gate_rows import HEADINGS, gate_rows, headline
    from gemma_deploy.artifact.report import effect_text, sensitive_rows
    from gemma_deploy.params.table import lowest_sqnr

    contract, parity, worst = manifest.contract, manifest.parity, lowest_sqnr(manifest.params)
    return {
        "artifact": {
            "name": manifest.name,
            "scheme": manifest.scheme + (", int8 KV cache" if manifest.int8_cache else ""),
            "model": f"{manifest.model.model_type}, {manifest.model.num_hidden_layers} layers",
            "checkpoint": f"{manifest.checkpoint.path} ({manifest.checkpoint.format})",
            **adapter_facts([one.model_dump() for one in manifest.checkpoint.adapters]),
            "batch, prefill, context": f"{contract.batch}, {contract.prefill}, {contract.context}"
            + (" (dynamic: any batch, largest lengths)" if contract.dynamic else ""),
            **({"chat format": manifest.chat_format} if manifest.chat_format else {}),
            "parity": headline(parity) if parity else "not run: nothing is proven",
            "layers that cost most alone": ", ".join(
                f"{row['layer']} (KL {row['kl']:.2g})" for row in sensitive_rows(manifest, 3)
            )
            or "not measured",
            "lowest SQNR": f"{worst.sqnr_db:.2f} dB, {worst.name}" if worst else "nothing is quantized",
        },
        "not for": [{"what": sentence} for sentence in contract.not_for or ()],
        "gate": [dict(zip(HEADINGS, row, strict=True)) for row in gate_rows(parity.lines)] if parity else [],
        "parts": part_rows(manifest),
        "graphs": [port for graph, found in contract.graphs.items() for port in _ports(graph, found)],
        "parameters": sizes((row.dtype, row.nbytes) for row in manifest.params),
        "arrived quantized": [
            {"form": row.form, "matrices": row.matrices, "here": "taken over" if row.taken_over else "dequantized"}
            | ({"why": row.why} if row.why else {})
            for row in manifest.checkpoint.arrived
        ],
        "operators": [
            {"operator": op, **{graph: census.get(op, 0) for graph, census in manifest.op_census.items()}}
            for op in sorted({op for census in manifest.op_census.values() for op in census})
        ],
        "ledger": [
            {"what": entry.what, "where": entry.where, "effect": effect_text(entry.effect)} for entry in manifest.ledger
        ],
        "stages": [
            {"stage": one.name, "seconds": round(one.seconds, 2), "peak MiB": one.peak_rss_bytes // MIB}
            for one in manifest.stages
        ],
        "made with": manifest.tool,
    }


def adapter_facts(adapters: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A row for the adapters that were added; none without them."""
    each = [f"{one['path']}, weight {one['weight']:g}, {one['fingerprint'][:12]}" for one in adapters]
    return {"adapter": "; ".join(each)} if each else {}


def runtime_adapters(artifact: Artifact) -> dict[str, Any]:
    """What an artifact takes of LoRA adapters, and those that it keeps; nothing where it takes none."""
    from gemma_deploy.artifact.adapters import kept_names, open_kept
    from gemma_deploy.errors import DeployError

    slots = artifact.manifest.contract.adapters
    if slots is None:
        return {}
    rows: list[dict[str, Any]] = []
    for name in kept_names(artifact):
        try:
            record = open_kept(artifact, name).record
        except DeployError as error:
            rows.append({"adapter": name, "from": error.what})
            continue
        size = round(record.file.bytes / MIB, 2)
        rows.append(
            {"adapter": name, "rank": record.rank, "linears": record.linears, "MiB": size, "from": record.source}
        )
    takes = f"of rank {slots.rank} at most, {slots.dtype}, on {len(slots.linears)} linears"
    return {"adapters": {"takes": takes, "keeps": len(rows) or "none"}, "kept adapters": rows}


def kernel_facts(artifact: Artifact) -> dict[str, Any]:
    """Which kernels of this program's own an artifact is computed with here; nothing where it has others."""
    from gemma_deploy.engine import open_engine
    from gemma_deploy.errors import UsageError

    if artifact.manifest.model.sentence is not None:  # no engine makes text of it
        return {}
    try:
        level = open_engine(artifact).level
    except UsageError as error:
        level = error.what
    candidates = artifact.manifest.contract.candidates
    head = {"head": f"screened, {candidates} rows whole"} if candidates is not None else {}
    return {"kernels": {"level on this machine": level} | head} if level else {}


def encoder_facts(head: SentenceHead | None) -> dict[str, Any]:
    """What stands behind an encoder; nothing of a model that generates text."""
    if head is None:
        return {}
    facts = {
        "vectors": f"{', '.join(map(str, head.sizes))} channels",
        "behind the mean": ", ".join(f"{one.name} {one.in_features} -> {one.out_features}" for one in head.dense)
        or "nothing",
        "prompts": "; ".join(f"{name}: {text!r}" for name, text in head.prompts.items()) or "none",
        "default prompt": head.default_prompt or "none",
        "longest text": f"{head.longest} tokens" if head.longest else "not said",
    }
    return {"encoder": facts}


def part_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """Stages and ranks of a divided artifact."""
    rows = []
    for part in manifest.parts:
        own = [row.nbytes for row in manifest.params if Path(row.file).parent.as_posix() == part.folder]
        first, stop = part.layers
        rank = f"{part.rank} of {part.ranks}"
        rows.append(
            {"part": part.folder, "layers": f"{first} to {stop - 1}", "rank": rank, "tensors": len(own)}
            | {"MiB": round(sum(own) / MIB, 2)}
        )
    return rows


def checkpoint_facts(checkpoint: Any) -> dict[str, Any]:
    """Config, sizes and notes of an open checkpoint."""
    from gemma_deploy.text import check_text

    config, text = checkpoint.config, check_text(checkpoint)
    window = config.sliding_window if "sliding_attention" in config.layer_types else None
    return {
        "checkpoint": {
            "path": str(checkpoint.path),
            "format": checkpoint.format,
            **adapter_facts([one.to_json() for one in checkpoint.adapters]),
            "model": f"{config.model_type}, {config.num_hidden_layers} layers",
            "heads": "; ".join(head_lines(config)),
            "hidden, intermediate": f"{config.hidden_size}, {config.intermediate_size}",
            "vocabulary": f"{config.vocab_size}, {'tied' if config.tie_word_embeddings else 'LM head of its own'}",
            "positions": config.max_position_embeddings,
            "sliding window": f"{window} in {config.layer_types.count('sliding_attention')} layers"
            if window
            else "none",
            "stop tokens": ", ".join(map(str, text.stop_ids)),
            "chat format": text.chat_format or "no chat template",
            "tokenizer": ", ".join(file.name for file in checkpoint.tokenizer_files())
            or ("inside" if checkpoint.format == "gguf" else "none"),
            "fingerprint": checkpoint.fingerprint(),
        },
        "parameters": sizes((stored_as(checkpoint, one), one.nbytes) for one in checkpoint.tensors.values()),
        "notes": [{"note": note} for note in dict.fromkeys((*checkpoint.notes, *config.warnings, *text.notes))],
    }


def head_lines(config: Any) -> list[str]:
    """Heads of every layer, or of each kind of layer where they differ."""
    found: dict[str, list[str]] = {}
    for layer in config.layers:
        said = f"{layer.heads}, {layer.kv_heads} for keys and values, of {layer.head_dim}"
        kinds = found.setdefault(said, [])
        if layer.kind not in kinds:
            kinds.append(layer.kind)
    return list(found) if len(found) == 1 else [f"{said} ({', '.join(kinds)})" for said, kinds in found.items()]


def stored_as(checkpoint: Checkpoint, tensor: TensorInfo) -> str:
    """The form that a tensor has in its file: a dtype, or how its codes are packed."""
    weight = checkpoint.quantized.get(tensor.name)
    return weight.described if weight is not None else tensor.dtype


def sizes(tensors: Any) -> list[dict[str, Any]]:
    """(dtype, bytes) of every tensor -> one row per dtype."""
    groups: dict[str, list[int]] = {}
    for dtype, nbytes in tensors:
        groups.setdefault(dtype, []).append(nbytes)
    return [
        {"dtype": dtype, "tensors": len(found), "MiB": round(sum(found) / MIB, 2)}
        for dtype, found in sorted(groups.items())
    ]


def _ports(graph: str, record: GraphRecord) -> list[dict[str, Any]]:
    """Inputs and outputs of a graph, its caches as one row, and their scales as another."""
    rows = []
    for side, ports in (("inputs", record.inputs), ("outputs", record.outputs)):
        caches = [port for port in ports if port.name.startswith(("past_key_values.", "present."))]
        plain = [port for port in ports if port not in caches]
        for dtype in dict.fromkeys(port.dtype for port in caches):
            alike = [port for port in caches if port.dtype == dtype]
            plain.append(replace(alike[0], name=f"{alike[0].name} ... ({len(alike)} in all)"))
        rows += [
            {"graph": graph, "side": side, "name": port.name, "dtype": port.dtype, "shape": str(list(port.shape))}
            for port in plain
        ]
    return rows


def _show(facts: dict[str, Any], tensors: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from gemma_deploy.tables import console

    shown = console(log_width=160)
    for title, part in {**facts, "tensors": tensors}.items():
        rows = [{"": key, " ": value} for key, value in part.items()] if isinstance(part, dict) else part
        if not rows:
            continue
        found = dict.fromkeys(key for row in rows for key in row)
        keys = [key for key in found if key not in ("offset", "sha256", "signal_energy")]
        table = Table(title=title, title_justify="left", show_header=not isinstance(part, dict))
        for key in keys:
            number = all(isinstance(row.get(key), int | float) for row in rows)
            table.add_column(key, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*("" if row.get(key) is None else str(row[key]) for key in keys))
        shown.print(table)
