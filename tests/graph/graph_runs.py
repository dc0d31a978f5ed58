"""Run static graphs in ONNX Runtime without the project's own runtime: an independent reading of the contract."""

from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import torch
from safetensors.torch import save_file

from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.graph.contract import GraphContract
from gemma_deploy.graph.export import export_graphs
from gemma_deploy.graph.external import attach_external, weightless, write_graph
from gemma_deploy.patched import patched_module

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "w8a16": torch.float32}
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}


def contract_of(config: ModelConfig, scheme, dynamic=False):
    return GraphContract.of(config, scheme, batch=2, prefill=64, context=128, dynamic=dynamic)


def build(config: ModelConfig, scheme, state, out, dynamic=False):
    """Export, write the weights with the safetensors library, attach and check."""
    contract = contract_of(config, scheme, dynamic)
    graphs = export_graphs(config, scheme, contract)
    params = {name: parameter(name, config, scheme, state, contract.context) for name in weightless(graphs["iter0"])}
    save_file(params, str(out / "params.safetensors"))
    attach_external(graphs, rows(out / "params.safetensors"), "params.safetensors")
    for name, graph in graphs.items():
        write_graph(graph, out / f"{name}.onnx")


def parameter(name, config, scheme, state, context):
    if "rotary_emb" in name:
        kind = name.split(".")[2]
        rope = config.rope[kind]
        rotary = patched_module("layers_vacc").LegacyRotary(config.head_dim, rope.theta, rope.factor)
        cos, sin = rotary.make_tables(context)
        table = cos if name.endswith("cos") else sin
        return table.half() if scheme == "fp16" else table
    if "norm" in name:
        return state[name].float()
    if scheme == "w8a16":
        weight, scale = patched_module("quantization_vacc").quantize_rows(state[name.replace(".scale", ".weight")])
        return scale if name.endswith(".scale") else weight
    return state[name].to(TORCH[scheme]).contiguous()


def rows(path):
    import json

    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    return [
        SimpleNamespace(
            name=name, dtype=NAMES[h["dtype"]], shape=tuple(h["shape"]), offset=8 + size + h["data_offsets"][0],
            nbytes=h["data_offsets"][1] - h["data_offsets"][0],
        )
        for name, h in header.items()
    ]  # fmt: skip


def session(path):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options)


def teacher_forced(out, contract, sequences, prompts):
    """Logits [batch, 1 + steps, vocab] of left-padded prompts, then one decode step per further token."""
    cache_dtype = np.dtype(contract.cache_dtype)
    batch, prefill, context = contract.batch, contract.prefill, contract.context
    ids, mask, positions = (np.zeros((batch, prefill), np.int64) for _ in range(3))
    for b, n in enumerate(prompts):
        ids[b, prefill - n :], mask[b, prefill - n :] = sequences[b][:n], 1
        positions[b, prefill - n :] = np.arange(n)
    first = session(out / "iter0.onnx").run(
        None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    )
    logits = [first[0][:, 0]]
    shape = (batch, contract.kv_heads, context, contract.head_dim)
    caches = [np.zeros(shape, cache_dtype) for _ in first[1:]]
    slots = np.zeros((batch, context + 1), np.int64)
    slots[:, :prefill], slots[:, -1] = mask, 1
    for cache, present in zip(caches, first[1:], strict=True):
        cache[:, :, :prefill] = present
    decode = session(out / "iter1.onnx")
    names = [port.name for port in contract.inputs("iter1")[3:]]
    for step in range(min(len(s) - n for s, n in zip(sequences, prompts, strict=True))):
        tokens = np.array([[s[n + step]] for s, n in zip(sequences, prompts, strict=True)])
        at = np.array([[n + step] for n in prompts])
        feed = {"input_ids": tokens, "attention_mask": slots, "position_ids": at}
        result = decode.run(None, feed | dict(zip(names, caches, strict=True)))
        logits.append(result[0][:, 0])
        for cache, present in zip(caches, result[1:], strict=True):
            cache[:, :, prefill + step] = present[:, :, 0]
        slots[:, prefill + step] = 1
    return np.stack(logits, 1)
