"""Run static graphs in ONNX Runtime without the project's own runtime: an independent reading of the contract."""

import numpy as np
import onnxruntime as ort


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
    first = session(out / "iter0.onnx").run(None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    logits = [first[0][:, 0]]
    caches = [np.zeros((batch, one.shape[1], context, one.shape[3]), cache_dtype) for one in first[1:]]
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
