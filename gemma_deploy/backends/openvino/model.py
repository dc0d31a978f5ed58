"""An artifact's model in OpenVINO: opened, cut at the LM head, and computed a step at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy import extras
from gemma_deploy.backends.openvino.decoder import NORMED
from gemma_deploy.errors import ArtifactError
from gemma_deploy.runtime.limits import REBUILD

DEVICE = "CPU"
WANTED = "wanted"  # the input that says of how many last tokens logits are wanted
# What the weights stand for, in float32, nothing rounded.
STRICT: Mapping[str, str] = {
    "EXECUTION_MODE_HINT": "ACCURACY",
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
}


def require_openvino(what: str) -> None:
    """See that OpenVINO is installed.

    Raises:
        UsageError: it is not.
    """
    extras.require("openvino", what=what)


def open_model(file: Path) -> Any:
    """The model of an artifact, as OpenVINO reads it.

    Raises:
        ArtifactError: it cannot be read, or lacks what the program wants of it.
    """
    import openvino as ov

    try:
        model = ov.Core().read_model(str(file))
    except RuntimeError as error:
        said = str(error).strip().splitlines()
        raise ArtifactError(
            f"OpenVINO cannot read it: {said[-1] if said else 'it says nothing'}", where=str(file), next_step=REBUILD
        ) from None
    if not {"input_ids", "attention_mask", "position_ids", "beam_idx"} <= {one.any_name for one in model.inputs}:
        raise ArtifactError("the model has other inputs than it was written with", where=str(file), next_step=REBUILD)
    return model


def with_wanted(model: Any) -> Any:
    """The model with one more input, [1] int64: of how many last tokens logits are computed. In place."""
    import openvino as ov
    from openvino import opset13 as op

    reader, normed = _head(model)
    wanted = op.parameter([1], ov.Type.i64, name=WANTED)
    wanted.output(0).get_tensor().set_names({WANTED})
    start = op.multiply(wanted, op.constant(np.array([-1], np.int64)))
    most, one = (op.constant(np.array([number], np.int64)) for number in (np.iinfo(np.int64).max, 1))
    last = op.slice(normed, start, most, one, one)
    reader.replace_source_output(last.output(0))
    model.add_parameters([wanted])
    model.validate_nodes_and_infer_types()
    return model


def cut_at_head(model: Any, hidden_size: int) -> tuple[Any, Any]:
    """What is in front of the LM head, and the head: hidden states [B,S,H], and logits of them."""
    import openvino as ov
    from openvino import opset13 as op

    reader, normed = _head(model)
    options = model.get_rt_info("runtime_options").astype(dict) if model.has_rt_info("runtime_options") else {}
    body = ov.Model([op.result(normed)], model.get_sinks(), model.get_parameters(), "body")
    hidden = op.parameter([-1, -1, hidden_size], ov.Type.f32, name=NORMED)
    reader.replace_source_output(hidden.output(0))
    head = ov.Model(model.get_results(), [hidden], "head")
    for one in (body, head):
        for key, value in options.items():
            one.set_rt_info(value, ["runtime_options", key])
    return body, head


def compiled(model: Any, *, threads: int = 0, options: Mapping[str, str] = {}) -> Any:
    """The model ready to run.

    Args:
        threads: 0 for as many as there are cores; options: of OpenVINO, beside what the model says.
    """
    import openvino as ov

    said: dict[str, Any] = {"NUM_STREAMS": 1, **options}
    if threads:
        said["INFERENCE_NUM_THREADS"] = threads
    return ov.Core().compile_model(model, DEVICE, said)


class State:
    """One sequence in a compiled model.

    Args:
        model: compiled, that of `with_wanted` or a body.
    """

    def __init__(self, model: Any) -> None:
        self._request = model.create_infer_request()
        self._takes = {name for port in model.inputs for name in port.names}
        self.length = 0

    def step(self, tokens: Sequence[int], wanted: int = 1) -> np.ndarray:
        """Read tokens: what the model gives, [rows, ...] float32, of the `wanted` last where it is asked for those."""
        count, total = len(tokens), self.length + len(tokens)
        fed: dict[str, np.ndarray] = {
            "input_ids": np.asarray([tokens], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self.length, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        if WANTED in self._takes:
            fed[WANTED] = np.array([wanted], np.int64)
        (found,) = self._request.infer(fed, share_outputs=True).values()
        self.length += count
        rows: np.ndarray = found[0]
        return rows

    def cut(self, length: int) -> None:
        """Forget all tokens behind the first `length`; what is kept is copied."""
        import openvino as ov

        for variable in self._request.query_state():
            kept = np.ascontiguousarray(variable.state.data[:, :, :length])
            variable.state = ov.Tensor(kept)
        self.length = length


def _head(model: Any) -> tuple[Any, Any]:
    """The input of the LM head's product, and the output that it reads."""
    for node in model.get_ordered_ops():
        for output in node.outputs():
            if NORMED in output.get_names():
                (reader,) = output.get_target_inputs()
                return reader, output
    raise ArtifactError(f"the model has nothing of the name {NORMED}", next_step=REBUILD)
