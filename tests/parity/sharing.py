"""Models some of whose layers read other layers' caches, on the static pair: what the tests of each of them do."""

import numpy as np
import onnx
import torch

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.tvm_vacc.runner import StaticRunner
from gemma_deploy.backends.tvm_vacc.segments import StrictSource
from gemma_deploy.parity.cases import Case
from gemma_deploy.testing import write_tiny_checkpoint
from tests.exporting import write_artifact
from tests.parity.conftest import finish, gate

WINDOW, PROMPTS, STEPS = 6, (32, 13), 20  # the longer prompt has five windows, the shorter is padded
VECTORS = "per_layer_input (activation, or the vectors of tokens)"


def artifacts_of(once, name, model_type, **changes):
    """Scheme -> a finished artifact, read only, its checkpoint beside it.

    Args:
        once: the fixture; name: of the folder that the tests share; changes: of the tiny config.
    """

    def artifact(scheme):
        def make(root):
            checkpoint = write_tiny_checkpoint(root / "checkpoint", model_type, sliding_window=WINDOW, **changes)
            write_artifact(checkpoint, root / "graphs", scheme)
            finish(root / "graphs", checkpoint, scheme, root / "artifact")

        return once(f"{name}-{scheme}", make) / "artifact"

    return artifact


def random_prompts():
    rng = np.random.default_rng(5)
    return [rng.integers(3, 512, n).tolist() for n in PROMPTS]


def broken_gate(artifact):
    return gate(artifact, prompt_tokens=32, decode_tokens=6)


def compare_text(artifact, stock, prompts):
    """Logits of both prompts and of steps behind them, the tokens chosen by transformers' logits."""
    runner = StaticRunner(artifact, "strict", 1)
    logits, sequences = runner.prefill(prompts), [list(prompt) for prompt in prompts]
    for step in range(STEPS):
        for row, sequence in enumerate(sequences):
            with torch.no_grad():
                expected = stock(torch.tensor([sequence])).logits[0, -1].numpy()
            # 2.1e-6 measured of E2B, 4.6e-6 of Gemma 3n
            assert np.abs(logits[row] - expected).max() <= 1e-5 * np.abs(expected).max(), (step, row)
            assert logits[row].argmax() == expected.argmax()
            sequence.append(int(expected.argmax()))
        logits = runner.step([sequence[-1] for sequence in sequences])


def compare_last_position(artifact, stock, prompts):
    """The last position alone is what all positions give, which is transformers'."""
    case = Case("random", tuple(map(tuple, prompts)), ((), ()))
    (last,), (every,) = (StrictSource(artifact, every=every).run([case]) for every in (False, True))
    for row, prompt in enumerate(prompts):
        assert (last[row].shape, every[row].shape) == ((1, 64), (len(prompt), 64))
        with torch.no_grad():
            expected = stock.model(torch.tensor([prompt])).last_hidden_state[0].numpy()
        # 8.5e-7 measured of E2B, 1.9e-6 of Gemma 3n
        assert np.abs(every[row] - expected).max() <= 1e-5 * np.abs(expected).max()
        # one row of a GEMM, and one among others: 0 measured
        assert np.abs(last[row] - every[row][-1:]).max() <= 2e-6 * np.abs(every[row]).max()


def layers_with_ports(artifact):
    """Numbers, as text, of the layers whose caches the decode graph takes."""
    inputs = Artifact.open(artifact).manifest.contract.graphs["iter1"].inputs
    return {one.name.split(".")[1] for one in inputs if "." in one.name}


def rows_of_mlps(artifact):
    """[batch, tokens, channels] of each layer's MLP in the prefill graph."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(artifact / "iter0.onnx", load_external_data=False)).graph
    rows = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.value_info}
    return [rows[f"model.layers.{layer}.mlp.up_proj.out"] for layer in range(7)]


def another_layers_cache(graph):
    """Let layer 4, which reads the cache of layer 2, read that of layer 0."""
    wrong = {f"past_key_values.2.{part}": f"past_key_values.0.{part}" for part in ("key", "value")}
    made = [[graph.maker(f"present.{i}.{part}").input[0] for part in ("key", "value")] for i in (2, 0)]
    wrong |= dict(zip(*made, strict=True))
    for node in (node for node in graph.graph.node if node.output[0].startswith("model.layers.4.")):
        node.input[:] = [wrong.get(one, one) for one in node.input]
