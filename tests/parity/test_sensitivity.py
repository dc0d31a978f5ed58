"""What one layer alone costs, against transformers with that layer's weights exchanged."""

import json

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.calibration import layer_weights
from gemma_deploy.calibration.pipeline import Request, make_windows
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.cli import main
from gemma_deploy.parity import sensitivity
from gemma_deploy.tables import figure
from gemma_deploy.testing import TINY_PER_LAYER, write_tiny_checkpoint
from tests.calibration.make import write_tokenizer

LAYERS = {"gemma": 2, "gemma2": 2, "gemma3_text": 3, "gemma4_text": 7}
CHANGES = {"gemma3_text": {"sliding_window_pattern": 3}, "gemma4_text": TINY_PER_LAYER}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(generation, quantize section) -> artifact, checkpoint."""
    made, root = {}, tmp_path_factory.mktemp("sensitivity")

    def compile_it(model_type, **quantize):
        key = json.dumps([model_type, quantize])
        if key not in made:
            path = root / model_type
            if not path.exists():
                changes = {"num_hidden_layers": LAYERS[model_type]} | CHANGES.get(model_type, {})
                write_tiny_checkpoint(path, model_type, **changes)
                write_tokenizer(path)
            frontend = {"checkpoint": str(path), "shape": {"input_ids": [[32], [48]]}, "quantize": quantize}
            content = {
                "name": f"x{len(made)}",
                "frontend": frontend,
                "dataset": {"name": "c4:4", "seqlen": 64},
                "backend": {"dtype": "int8", "type": "onnxruntime" if model_type == "gemma4_text" else "tvm_vacc"},
                "workspace": {"path": str(root / "w")},
            }
            (root / "r.yaml").write_text(yaml.safe_dump(content))
            assert main(["compile", str(root / "r.yaml"), "--no-parity"]) == 0
            made[key] = root / "w" / content["name"], Checkpoint.open(path)
        return made[key]

    return compile_it


@pytest.mark.parametrize(
    ("model_type", "quantize"),
    [
        ("gemma", {"type": "w4a16_gptq"}),
        ("gemma2", {"type": "w4a16_gptq", "table": "int8"}),
        ("gemma3_text", {"type": "w8a16_gptq"}),
        pytest.param("gemma3_text", {"type": "w4a16"}, marks=pytest.mark.slow),
        pytest.param("gemma4_text", {"type": "w4a16_gptq"}, marks=pytest.mark.slow),  # E2B's layers
    ],
)
def test_it_is_what_transformers_loses(compiled, model_type, quantize):
    artifact, checkpoint = compiled(model_type, **quantize)
    manifest = json.loads((artifact / "manifest.json").read_text())
    found, stored = manifest["sensitivity"], ArtifactWeights(checkpoint.config, artifact, Manifest.of(manifest))
    window = make_windows(checkpoint, Request("c4:4", None, 4, 64)).ids[0]
    assert found["tokens"] == len(window) == 64  # eight attention windows

    def logits(changed, prefix=None):
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, attn_implementation="eager", dtype=torch.float32)
        for name in stored.tensors:
            if changed(name):
                rows = torch.from_numpy(stored.rows(name, 0, stored.tensors[name].shape[0]))
                model.state_dict()[name].copy_(rows)  # numbers of layers are buffers
        if prefix == "table" and (scale := stored.embedding_scale()) is not None:
            rows = model.model.embed_tokens.weight.data * torch.from_numpy(scale) / checkpoint.config.hidden_size**0.5
            model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.data.clone())
            model.model.embed_tokens.weight = torch.nn.Parameter(rows)
        with torch.inference_mode():
            return model(torch.from_numpy(window[None])).logits[0].double().log_softmax(-1)

    exact = logits(lambda name: False)

    def loss(test):
        return float((exact.exp() * (exact - test)).sum(1).mean())

    layers = [loss(logits(lambda name, i=i: name.startswith(f"model.layers.{i}."))) for i in range(LAYERS[model_type])]
    table = loss(logits(lambda name: not name.startswith("model.layers."), "table"))
    # float32 logarithms: 1e-7 of errors in KLs of 1e-6 and more
    np.testing.assert_allclose(found["layers"], layers, rtol=0.02, atol=2e-7)
    np.testing.assert_allclose(found["table"], table, rtol=0.02, atol=2e-7)
    assert min(layers) > 1e-6
    assert max(layers) > 1.1 * min(layers), "layers exchanged with one another would not be seen"


def test_report_and_inspect_name_the_layers(compiled, capsys):
    artifact, _ = compiled("gemma3_text", type="w8a16_gptq")
    manifest = json.loads((artifact / "manifest.json").read_text())
    losses = manifest["sensitivity"]["layers"]
    worst = max(range(3), key=lambda layer: losses[layer])
    page = (artifact / "report.html").read_text()
    part = page[page.index("<h2>What each layer costs alone</h2>") : page.index("<h2>Ledger")]
    assert [f"<title>layer {layer}: " in part for layer in range(4)] == [True, True, True, False]
    assert f"<title>layer {worst}: {figure(losses[worst])} nats</title>" in part
    assert main(["inspect", str(artifact)]) == 0
    assert f"{worst} (KL {losses[worst]:.2g})" in " ".join(capsys.readouterr().out.split())


def test_it_can_be_left_out(compiled):
    artifact, _ = compiled("gemma", type="w8a16_gptq", calib_args={"sensitivity": False})
    assert json.loads((artifact / "manifest.json").read_text())["sensitivity"] is None
    assert "<h2>What each layer costs alone</h2>" not in (artifact / "report.html").read_text()


def test_one_layer_is_in_memory_at_a_time_and_no_file_is_left(compiled, tmp_path, monkeypatch):
    artifact, checkpoint = compiled("gemma3_text", type="w8a16_gptq")
    manifest = json.loads((artifact / "manifest.json").read_text())
    alive, most = set(), []
    real = sensitivity.loaded

    class Watched:
        def __init__(self, *args):
            self.inner, self.name = real(*args), args[2]

        def __enter__(self):
            alive.add(self.name)
            most.append(len(alive))
            return self.inner.__enter__()

        def __exit__(self, *error):
            alive.discard(self.name)
            return self.inner.__exit__(*error)

    for module in (sensitivity, layer_weights):
        monkeypatch.setattr(module, "loaded", Watched)
    seen = []
    sensitivity.measure_sensitivity(
        checkpoint,
        ArtifactWeights(checkpoint.config, artifact, Manifest.of(manifest)),
        [2, *range(3, 60)],
        scratch=tmp_path,
        progress=lambda *step: seen.append(step),
    )
    assert (max(most), len(most)) == (1, 2 * 3 + 2)
    assert seen[:3] == [(1, 6), (2, 6), (3, 6)]  # the other half: logits of three layers and the table
    assert seen[3:] == [(3.75, 6), (4.5, 6), (5.25, 6), (6, 6)]
    assert not list(tmp_path.iterdir())
