"""Parameter files and references for these tests, by NumPy and transformers alone: nothing of the compiler's is used.

A file here has what the compiler would write: float32 first, then codes with a zero point of 128 (8 bits) or 8 (4 bits,
the first of a pair in the low half), or transposed ones, signed and [in, out].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from gemma_deploy.backends.onnxruntime.decoder import build_decoder
from gemma_deploy.backends.onnxruntime.options import Kernels
from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.checkpoint.expected import expected_tensors
from gemma_deploy.graph.contract import AdapterSlots
from gemma_deploy.testing import TINY_CONFIGS

FILE = "params.safetensors"
TABLE = "model.embed_tokens"
# A window of 8, an odd layer behind the last pattern, both kinds of layers, two heads to one of keys and values.
CHANGES: dict[str, dict[str, Any]] = {
    "gemma": {"num_hidden_layers": 2},
    "gemma2": {"num_hidden_layers": 3},
    "gemma3_text": {"num_hidden_layers": 4, "sliding_window_pattern": 3},
}
KINDS = tuple(CHANGES)
# name -> (bits, columns that share a scale) of the linears and of the table; None: one scale per row
FORMS: dict[str, tuple[tuple[int, int | None], tuple[int, int | None]] | None] = {
    "fp32": None,
    "w8": ((8, None), (8, 32)),
    "w8row": ((8, None), (8, None)),
    "w8group": ((8, 32), (8, 64)),
    "w4": ((4, 32), (8, 64)),
}
# Forms with some kinds of linears in 8 bits: the form of all others, and those kinds
MIXED = {"w4kv": ("w4", ("k_proj", "v_proj")), "w4vdown": ("w4", ("v_proj", "down_proj", "gate_proj"))}
TRANSPOSED = {
    "w8t": "w8",
    "w8rowt": "w8row",
}  # the same with the linears transposed: their graphs have integer products


@dataclass(frozen=True)
class Row:
    """A tensor of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass
class ParamFile:
    """A file under construction, written at once by `write`."""

    folder: Path
    wide: list[tuple[str, np.ndarray]] = field(default_factory=list)
    codes: list[tuple[str, np.ndarray, str]] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)  # what the file stands for, float32
    signed: dict[str, np.ndarray] = field(default_factory=dict)  # codes without their zero point
    scales: dict[str, np.ndarray] = field(default_factory=dict)

    def add(
        self, name: str, weight: np.ndarray, form: tuple[int, int | None] | None = None, transposed: bool = False
    ) -> None:
        """Round a matrix to nearest, or keep it."""
        if form is None:
            self.wide.append((name, weight))
            self.weights[name] = weight
            return
        bits, group = form
        most = 2 ** (bits - 1) - 1
        grouped = weight.reshape(len(weight), -1, group or weight.shape[1])
        scales = (np.abs(grouped).max(2) / most).astype(np.float32)
        scales[scales == 0] = 1
        codes = np.clip(np.rint(grouped / scales[..., None]), -most, most).astype(np.int8)
        self.weights[name] = (codes * scales[..., None]).reshape(weight.shape)
        module = name.removesuffix(".weight")
        self.signed[module] = codes.reshape(weight.shape)
        self.scales[module] = scales if group else scales[:, 0]
        self.wide.append((f"{module}.scale", self.scales[module]))
        lying = self.signed[module].T if transposed else self.signed[module]
        self.codes.append((name, lying, "int8" if transposed else f"uint{bits}"))

    def write(self, gap_before: str | None = None) -> list[Row]:
        """The rows of the file, which begins with a page of other things."""
        data, rows = bytearray(4096), []
        stored = [(name, "float32", array.shape, array.astype("<f4").tobytes()) for name, array in self.wide]
        stored += [(name, dtype, c.shape, packed(c, dtype)) for bits in ("8", "4") for name, c, dtype in self.codes
                   if dtype.endswith(bits)]  # fmt: skip
        for name, dtype, shape, raw in stored:
            data += bytes(64) if name == gap_before else b""
            rows.append(Row(name, dtype, tuple(shape), len(data), len(raw)))
            data += raw
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / FILE).write_bytes(data)
        return rows


def packed(codes: np.ndarray, dtype: str) -> bytes:
    """Codes as they lie in the file."""
    if dtype == "int8":
        return codes.tobytes()
    unsigned = (codes.astype(np.int16) + (128 if dtype == "uint8" else 8)).astype(np.uint8)
    return (unsigned if dtype == "uint8" else unsigned[..., 0::2] | unsigned[..., 1::2] << 4).tobytes()


@dataclass
class Made:
    """A tiny model's parameter file, and what it stands for."""

    raw: dict[str, Any]
    config: ModelConfig
    file: ParamFile
    rows: list[Row]
    column_scale: np.ndarray | None

    @property
    def folder(self) -> Path:
        return self.file.folder

    def graph(
        self, *, rows: Sequence[Row] | None = None, adapters: AdapterSlots | None = None, **kernels: Any
    ) -> ir.Model:
        """A fresh graph over the file."""
        scale = float(np.sqrt(np.float32(self.config.hidden_size)))
        return build_decoder(
            self.config, Kernels(**kernels), rows or self.rows, location=FILE, embed_scale=scale, adapters=adapters
        )

    def session(self, model: ir.Model | None = None, **kernels: Any) -> ort.InferenceSession:
        return open_session(model or self.graph(**kernels), self.folder)


def make(folder: Path, kind: str, form: str, seed: int = 0, **changes: Any) -> Made:
    """Random weights, wide enough that window, caps and norms matter, in one of `FORMS` or of `TRANSPOSED`."""
    raw = {**TINY_CONFIGS[kind], **CHANGES[kind], **changes}
    config = ModelConfig.from_dict(raw, "config.json")
    transposed, form = form in TRANSPOSED, TRANSPOSED.get(form, form)
    form, kept = MIXED.get(form, (form, ()))
    rng, file, forms = np.random.default_rng(seed), ParamFile(folder), FORMS[form]
    for name, shape in expected_tensors(config).items():
        weight = (rng.standard_normal(shape) * (0.3 if "norm" in name else 0.12)).astype(np.float32)
        linear = ".layers." in name
        own = forms[not linear] if forms and len(shape) == 2 else None
        if own and name.split(".")[-2] in kept:
            own = (8, own[1])
        file.add(name, weight, own, transposed and linear)
    columns = None
    if form == "w8row":  # as calibrated schemes have it: sqrt(hidden) included
        columns = (np.sqrt(config.hidden_size) * rng.uniform(0.5, 2, config.hidden_size)).astype(np.float32)
        file.wide.append((f"{TABLE}.column_scale", columns))
    positions = np.arange(96)[:, None]
    for layer_type in dict.fromkeys(config.layer_types):
        local = layer_type == "sliding_attention" and kind == "gemma3_text"
        theta = raw["rope_local_base_freq"] if local else raw["rope_theta"]
        angles = positions * theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        for table in ("cos", "sin"):
            values = getattr(np, table)(angles).astype(np.float32)
            file.wide.append((f"model.rotary_emb.{layer_type}.{table}", values))
    return Made(raw, config, file, file.write(), columns)


def reference(made: Made, **changes: Any) -> Any:
    """transformers' own class with eager attention on the weights that the file stands for."""
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    weights, raw = dict(made.file.weights), {**made.raw, **changes, "torch_dtype": "float32"}
    if made.column_scale is not None:  # a table of its own for the embedding
        table = weights[f"{TABLE}.weight"]
        raw["tie_word_embeddings"] = False
        weights.setdefault("lm_head.weight", table.copy())
        weights[f"{TABLE}.weight"] = table * made.column_scale / np.sqrt(np.float32(made.config.hidden_size))
    folder = made.folder / "reference"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({name: np.ascontiguousarray(w) for name, w in weights.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def expected_logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """[tokens, V]."""
    import torch

    with torch.inference_mode():
        return np.asarray(model(torch.tensor([list(tokens)])).logits[0])


def open_session(model: ir.Model, folder: Path, optimize: bool = True, threads: int = 1) -> ort.InferenceSession:
    """As a user's session, which optimizes the graph; without, nodes run as they are written."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


Caches = dict[str, np.ndarray]


def run(
    session: ort.InferenceSession,
    tokens: Sequence[Sequence[int]],
    caches: Caches | None = None,
    mask: Sequence[Sequence[int]] | None = None,
    adapter: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """All outputs, of new tokens [B,S] after what the caches hold."""
    ids = np.array(tokens, np.int64)
    past_inputs = {value.name: value for value in session.get_inputs() if value.name.startswith("past")}
    if caches is None:
        caches = {name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
                  for name, value in past_inputs.items()}  # fmt: skip
    past = next(iter(caches.values())).shape[2]
    feeds = {"input_ids": ids, "attention_mask": np.ones((len(ids), past + ids.shape[1]), np.int64)}
    if mask is not None:
        feeds["attention_mask"] = np.array(mask, np.int64)
    found = session.run(None, feeds | dict(caches) | dict(adapter or {}))
    return dict(zip([value.name for value in session.get_outputs()], found, strict=True))


def grown(found: Mapping[str, np.ndarray]) -> Caches:
    """The caches among the outputs, by the names of the inputs."""
    return {name.replace("present", "past_key_values"): value
            for name, value in found.items() if name.startswith("present")}  # fmt: skip


def step(
    session: ort.InferenceSession,
    tokens: Sequence[Sequence[int]],
    caches: Caches | None = None,
    mask: Sequence[Sequence[int]] | None = None,
    adapter: Mapping[str, np.ndarray] | None = None,
) -> tuple[np.ndarray, Caches]:
    """Logits and the longer caches."""
    found = run(session, tokens, caches, mask, adapter)
    return found["logits"], grown(found)


def off(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest expected value."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())
