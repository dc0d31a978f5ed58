"""Write the parts of docs/ that follow from the code: keys of recipes, limits of the gate.

    python scripts/make_docs.py            write them
    python scripts/make_docs.py --check    exit 1 where a page is not what would be written

What is between `<!-- generated: NAME -->` and `<!-- end -->` in a page is written here, the rest by hand. A key of the
schema without a sentence in `MEANING`, or a sentence without a key, is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gemma_deploy import backends
from gemma_deploy.backends.onnxruntime.gates import adapter_gates, dynamic_gates
from gemma_deploy.backends.spec import VENDOR_KEYS
from gemma_deploy.backends.tvm_vacc.gates import gates_of
from gemma_deploy.parity.gates import LOWEST_SQNR_DB, MERGE_LIMIT, Gate
from gemma_deploy.parity.weights import LIMITS
from gemma_deploy.quantization.rescaling import HEADROOM
from gemma_deploy.recipe.sections import VENDOR, RecipeSections
from gemma_deploy.schemes import FLOATS, QUANTIZERS, Scheme

DOCS = Path(__file__).resolve().parent.parent / "docs"
MARK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

# Dotted key -> what it does. Keys that only the vendor's compiler reads are listed without one.
MEANING: Mapping[str, str] = {
    "name": "Name of the artifact: it is written to `workspace.path`/NAME.",
    "frontend.checkpoint": "A directory of safetensors, a `.gguf` file, or `demo`, the bundled model.",
    "frontend.type": "What the checkpoint is: `gguf` where it ends in `.gguf`.",
    "frontend.adapter": "A directory that peft wrote, or a list of such or of `{path, weight}`: added to the "
    "weights while they are read: [adapters](adapters.md).",
    "frontend.shape.input_ids": "`[[P], [C]]`: tokens of the longest prompt, and slots of the KV cache. Multiples of "
    "16, P at most C, C at most what the model was made for.",
    "frontend.shape.batch": "B, sequences that static graphs take together.",
    "frontend.shape.dynamic": "Batch and lengths are free in the graphs; P and C are the largest. Short: `--dynamic`.",
    "frontend.model_kwargs.tp": "Tensor-parallel ranks. KV heads are repeated where there are more ranks than heads.",
    "frontend.model_kwargs.b2s": "The vendor's batch-to-sequence layout. With one sequence it is the usual layout; "
    "with more it is refused.",
    "frontend.model_kwargs.model_arch": "The vendor's name of the patched modeling files.",
    "frontend.model_kwargs.align_qkv": "Allow to repeat KV heads where `tp` neither divides their number nor is a "
    "multiple of it.",
    "frontend.model_kwargs.embed_scale": "Rounding of the embedding scale, sqrt(hidden_size): `exact` as transformers "
    "computes in float32, `bf16` as the model was trained.",
    "frontend.quantize.type": "How int8 and int4 weights are chosen, and whether the cache has 8 bits: "
    "[quantization](quantization.md).",
    "frontend.quantize.table": "Form of the token table and LM head. null: `int8` for the static pair in `w8a16`, else "
    "the largest groups up to 128 that divide the hidden size.",
    "frontend.quantize.per_layer_table": "Form of the table of per-layer vectors (Gemma 3n, Gemma 4 E2B and E4B): "
    "`int8` in groups of 128 columns, or `int4` in groups of 32, for `onnxruntime` alone. null: `int8`.",
    "frontend.quantize.device": "The vendor's key. Calibration runs on the CPU whatever it says, and `--dry-run` says "
    "so.",
    "frontend.quantize.calib_args.true_sequential": "Linears of a layer see what its quantized linears before them "
    "give.",
    "frontend.quantize.calib_args.percdamp": "Damping of the solver, a share of the mean of the Hessian's diagonal "
    "(also `damp_percent`). null: chosen by the quantizer.",
    "frontend.quantize.calib_args.act_order": "Round channels of large power first (also `desc_act`). null: chosen by "
    "the quantizer.",
    "frontend.quantize.calib_args.wbits": "Repeats what `type` says; refused where it contradicts it.",
    "frontend.quantize.calib_args.blocksize": "Columns that the solver compensates together.",
    "frontend.quantize.calib_args.groupsize": "Input channels that share a scale; -1: one scale per row. null: -1 in 8 "
    "bits, 32 in 4.",
    "frontend.quantize.calib_args.sensitivity": "Measure what each layer costs alone, for the report. null: where "
    "weights are calibrated.",
    "frontend.quantize.calib_args.keep_a16": "`w8a8`: the largest share of the linears, by multiplications, whose "
    "inputs are not rounded to 8 bits. null: 0.1, and 0.34 with the integer products of ONNX Runtime and of `native`.",
    "frontend.quantize.calib_args.keep_w8": "4 bits: kinds of linears that stay in 8 bits. null: k_proj and v_proj; "
    "`[]`: none.",
    "split.points": "Layers that begin a new stage: [divided models](divided-models.md).",
    "dataset.type": "The vendor's key.",
    "dataset.name": "Calibration text: `c4`, `ceval`, `alpaca`, or a mix, `c4:64,ceval:32,alpaca:32`: "
    "[calibration data](calibration-data.md).",
    "dataset.path": "Where it lies: a file, `hub`, `hub:OWNER/NAME[:CONFIG]`, in a mix `NAME=PLACE,NAME=PLACE`. null: "
    "the bundled sample.",
    "dataset.nsamples": "Windows. Not written down, as many as the bundled sample holds, where that is used.",
    "dataset.seqlen": "Tokens in a window, BOS included. Likewise.",
    "backend.type": "What the artifact is for: [back ends](back-ends.md).",
    "backend.dtype": "`int8` without `frontend.quantize` means `w8a16`.",
    "backend.merge_params": "Both graphs share `params.safetensors`. `false` is not built.",
    "backend.compile": "The back end's own keys, below, and the vendor's.",
    "adapters.rank": "Largest rank of LoRA adapters that are loaded beside the artifact and changed without reloading "
    "it: [adapters](adapters.md#beside-an-artifact). Without the section an artifact takes none. `onnxruntime` and "
    "`native`.",
    "parity.text": "UTF-8 file that prompts of the gate come from. null: the bundled C4 sample.",
    "parity.prompt_tokens": "Tokens of a prompt, at least. More where the sliding window asks for it and P allows it.",
    "parity.decode_tokens": "Decode steps that are compared after each prompt.",
    "parity.gate": "`false`: a comparison that fails is shown, and the compile goes on.",
    "workspace.path": "Where artifacts go.",
    "workspace.workers": "Tensors written at a time; where it is written down and more than 1, processes that "
    "calibrate.",
    "workspace.cluster": "A Ray cluster that calibrates in their place: `auto`, `HOST:PORT` or `ray://HOST:PORT`.",
    "finetune.data": "File of examples: [fine-tuning](finetune.md#data). A compile reads nothing of this section.",
    "finetune.field": "The key that holds the text of an example. null: `text`.",
    "finetune.format": "What the file holds; `auto` tells by the keys of the first example.",
    "finetune.method": "LoRA, LoRA on 4-bit weights of bitsandbytes, or every weight.",
    "finetune.out": "Directory of adapter, report and figures.",
    "finetune.model": "The class that is trained: of transformers, or the patched one. Both attend eagerly.",
    "finetune.base": "An int8 artifact of the checkpoint, whose codes LoRA is trained on: "
    "[what is trained is what is deployed](finetune.md#on-the-weights-of-an-artifact).",
    "finetune.loss": "`answers`: tokens of answers alone count, where the data say which part is one.",
    "finetune.max_length": "Tokens of an example, at most. null: 1024, or what the model was made for.",
    "finetune.too_long": "What becomes of longer ones: cut at their end and counted, or refused.",
    "finetune.eval_data": "File of held-out examples. null: `validation`.",
    "finetune.validation": "Part of the data that is held out: a share below 1, or a number of examples.",
    "finetune.patience": "Evaluations without a better loss after which training ends. null: it does not end early.",
    "finetune.samples": "Held-out examples that are answered before and after, for the report.",
    "finetune.devices": "Processes that train together.",
    "finetune.accelerate_config": "File that `accelerate config` wrote: DDP, FSDP, DeepSpeed.",
    "finetune.lora.r": "Rank of the adapter.",
    "finetune.lora.alpha": "The update is B A alpha / r.",
    "finetune.lora.dropout": "Share of the adapter's inputs that is dropped in training.",
    "finetune.lora.targets": "Linears that get one, such as `[q_proj, v_proj]`. null: every linear of a layer.",
    "finetune.lora.rslora": "Divide by sqrt(r) in the place of r.",
    "finetune.lora.dora": "Train a magnitude for each row beside it (DoRA).",
    "finetune.sft": "Fields of TRL's `SFTConfig`, such as `{max_steps: 200, learning_rate: 1.0e-4}`.",
    "onnxruntime.prefill": "Kernel of the linears: [which](back-ends.md#kernels). null: `fast` in int8 with one scale "
    "per row, else `lean`.",
    "onnxruntime.head": "`screened` multiplies the high half of every code of the table first, and whole rows for the "
    "likeliest tokens. null: `whole`.",
    "openvino.cache": "What keys and values are kept as: `f16`, `f32`, or `u8`, codes that OpenVINO makes. "
    "null: `f16`.",
    "openvino.round_inputs": "Round the inputs of products with codes to 8 bits, a scale for 32 of them, as OpenVINO "
    "does unless it is told not to: faster, and less exact. null: no.",
    "tvm.triple": "LLVM's triple of the machine that it is compiled for, such as `aarch64-linux-gnu`: "
    "[another machine](tvm.md#for-another-machine). null: this one's.",
    "tvm.cpu": "LLVM's name of its processor, such as `x86-64-v3` or `cortex-a76`. null: the level of this one "
    "(`x86-64-v2`, `v3`, `v4`), or `generic` of another machine.",
    "native.head": "`screened` multiplies the high half of every code of the table first, and whole rows for the "
    "likeliest tokens: [how](kernels.md#a-screened-head). null: `whole`.",
    "native.candidates": "Rows that a screened head reads whole for a token. null: 8192.",
    "onnxruntime.cache": "`window`: sliding layers keep their window alone. null: `full`.",
    "onnxruntime.block": "Input channels that share a scale of the activations in block products. null: 128.",
    "onnxruntime.logits": "Logits of each row's last token or of every token. null: `last`.",
}


def keys(kind: type[BaseModel], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every key of a section, those of the sections in it as well."""
    for name, field in kind.model_fields.items():
        key = f"{above}{name}"
        inner = next((one for one in alternatives(field.annotation) if is_section(one)), None)
        if inner is None:
            yield key, field
        else:
            yield from keys(inner, f"{key}.")


def is_section(kind: Any) -> bool:
    """Whether a type is a section of a recipe."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def values(kind: Any, bounds: tuple[Any, ...] = ()) -> str:
    """What a type takes, for people."""
    known = [one for one in alternatives(kind) if one is not NoneType]
    if len(known) > 1:
        return ", ".join(values(one, bounds) for one in known)
    found = known[0]
    if get_origin(found) is Annotated:
        inner, *extra = get_args(found)
        return values(inner, (*bounds, *(each for one in extra for each in getattr(one, "metadata", (one,)))))
    if get_origin(found) is Literal:
        return ", ".join(f"`{one}`" for one in get_args(found))
    if get_origin(found) is list:
        return f"list of {values(get_args(found)[0])}"
    names = {str: "text", int: "whole number", float: "number", bool: "true, false", Any: "anything"}
    return " ".join([names.get(found, "mapping"), *limits(bounds)])


def limits(bounds: tuple[Any, ...]) -> Iterator[str]:
    """Bounds of a number as words."""
    for bound in bounds:
        match bound:
            case Ge(ge=low):
                yield f"from {low}"
            case Gt(gt=low):
                yield f"above {low}"
            case Le(le=high):
                yield f"up to {high}"
            case Lt(lt=high):
                yield f"below {high}"
            case MinLen():
                pass


def shown(value: Any) -> str:
    """A default as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"`{value}`" if isinstance(value, str) else str(value)


def row(key: str, field: FieldInfo, meaning: str) -> str:
    """One line of the table."""
    default = "**required**" if field.is_required() else shown(field.get_default(call_default_factory=True))
    kind = values(field.annotation, tuple(field.metadata))
    return f"| `{key}` | {kind} | {default} | {meaning} |"


HEADER = "| key | values | default | what it does |\n| --- | --- | --- | --- |"


def recipe_keys() -> str:
    """Every key of a recipe, with a table for each part of it."""
    found = list(keys(RecipeSections))
    vendor = [key for key, field in found if field.description == VENDOR]
    parts: dict[str, list[str]] = {}
    for key, field in found:
        if key not in vendor:
            part = (
                ".".join(key.split(".")[:2])
                if key.startswith("frontend.") and key.count(".") > 1
                else key.split(".")[0]
            )
            part = "frontend" if part == "name" else part
            parts.setdefault(part, []).append(row(key, field, MEANING[key]))
    lines = []
    for part, rows in parts.items():
        title = "name and frontend" if part == "frontend" else part
        lines += [f"## {title}", "", HEADER, *rows, ""]
    for name in backends.ROWS:
        options = list(keys(backends.backend(name).options))
        if options:
            rows = [row(f"backend.compile.{key}", field, MEANING[f"{name}.{key}"]) for key, field in options]
            lines += [f"## backend.compile with backend.type: {name}", "", HEADER, *rows, ""]
    lines += ["## Read by the vendor's compiler alone", "", "Carried into the manifest as they are:", ""]
    lines += [", ".join(f"`{key}`" for key in vendor) + ",", "and in `backend.compile`: "]
    lines[-1] += ", ".join(f"`{key}`" for key in sorted(VENDOR_KEYS)) + "."
    return "\n".join(lines) + "\n"


COLUMNS = {
    "relative": "must repeat: relative error at most",
    "kl_mean": "mean KL at most",
    "ppl_delta": "perplexity change at most",
    "overturned": "overturned lead at most",
}


def gate_row(scheme: str, gates: Sequence[Gate], columns: Collection[str]) -> str:
    """One line of the table: the limits of a scheme by what they are on."""
    cells = []
    for measure in columns:
        found = [gate for gate in gates if gate.measure == measure]
        if measure == "relative":
            limits = dict.fromkeys(f"{gate.limit:g}" for gate in found)
            cells.append("; ".join(f"{' = '.join(gate.pair)}" for gate in found) + f": {', '.join(limits)}")
        else:
            several = len({gate.pair[1] for gate in found}) > 1
            cells.append(", ".join(f"{gate.limit:g}" + f" ({gate.pair[1]})" * several for gate in found))
    return "| " + " | ".join([f"`{scheme}`", *cells]) + " |"


def gate_table(rows: Mapping[str, Sequence[Gate]]) -> list[str]:
    """A table of the limits of schemes, without columns that are empty in all of them."""
    columns = [name for name in COLUMNS if any(gate.measure == name for gates in rows.values() for gate in gates)]
    header = "| " + " | ".join(["scheme", *(COLUMNS[name] for name in columns)]) + " |"
    rule = "| " + " | ".join("---" for _ in range(len(columns) + 1)) + " |"
    return [header, rule, *(gate_row(scheme, gates, columns) for scheme, gates in rows.items())]


def gate_limits() -> str:
    """Every limit of both back ends."""
    schemes = (*FLOATS, *QUANTIZERS)
    cached = [scheme for scheme in schemes if scheme != "fp32"]
    names = {scheme: str(Scheme(scheme, int8_cache=True)) for scheme in cached}
    names |= {scheme: f"{names[scheme]}, dtype {scheme}" for scheme in FLOATS if scheme in names}
    stored = ", ".join(f"{dtype} {limit:g}" for dtype, limit in LIMITS.items())
    lines = [
        *("### The static pair", ""),
        *gate_table({scheme: gates_of(scheme, False) for scheme in schemes}),
        *("", "With an int8 cache:", ""),
        *gate_table({names[scheme]: gates_of(scheme, True) for scheme in cached}),
        *("", "### ONNX Runtime", ""),
        *gate_table({scheme: dynamic_gates(scheme) for scheme in schemes if scheme != "fp16"}),
        *("", "With an int8 cache:", ""),
        *gate_table({names[scheme]: dynamic_gates(scheme, int8_cache=True) for scheme in QUANTIZERS}),
        *("", "With an adapter beside the weights (mean KL to `peft`):", ""),
        *gate_table({scheme: adapter_gates(scheme) for scheme in schemes if scheme != "fp16"}),
        *("", "### Both", ""),
        "| scheme | compared | measure | limit |",
        "| --- | --- | --- | --- |",
        f"| all | checkpoint = stored weights | error of the worst tensor, relative to its norm | at most {stored} |",
        f"| all, with adapters | peft = merged | relative error | at most {MERGE_LIMIT:g} |",
        f"| 8-bit linears | weights | SQNR of the worst decoder layer | at least {LOWEST_SQNR_DB:g} dB |",
        f"| `fp16` | hf | headroom below float16's largest number | at least {HEADROOM:g} |",
    ]
    return "\n".join(lines) + "\n"


PARTS: Mapping[str, Callable[[], str]] = {"recipe-keys": recipe_keys, "gate-limits": gate_limits}


def rewritten(text: str) -> str:
    """A page with its generated parts as they should be."""
    return MARK.sub(lambda match: f"{match[1]}\n{PARTS[match[2]]()}\n{match[3]}", text)


def check_meanings() -> None:
    """Every key that is interpreted has a sentence, and every sentence a key.

    Raises:
        SystemExit: naming those that lack one.
    """
    known = {key for key, field in keys(RecipeSections) if field.description != VENDOR}
    for name in backends.ROWS:
        known |= {f"{name}.{key}" for key, _ in keys(backends.backend(name).options)}
    if known != set(MEANING):
        without, unknown = sorted(known - set(MEANING)), sorted(set(MEANING) - known)
        raise SystemExit(
            f"scripts/make_docs.py: keys without a sentence: {without}; sentences without a key: {unknown}"
        )


def main(*arguments: str) -> int:
    """Write or check all pages; the exit code."""
    check_meanings()
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := rewritten(text)) != text:
            stale.append(page)
            if "--check" not in arguments:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        print(f"{page.name}: {'out of date' if '--check' in arguments else 'written'}")
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
