"""LoRA on the codes of an artifact: it is trained on what the artifact computes with, and nothing is rounded again."""

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import DeployError
from gemma_deploy.finetune.codes import DequantizedLinear, quantized
from gemma_deploy.finetune.model import load_model
from gemma_deploy.finetune.run import finetune
from tests.finetune.make import TEXTS, adapter_of, settings, texts_file, tiny, write_lines

LORA = {"r": 4, "alpha": 8}
LENGTH = 64
RECIPE = """\
name: tiny
frontend: {{checkpoint: {checkpoint}, shape: {{input_ids: [[64], [128]]}}}}
backend: {{type: onnxruntime, dtype: int8}}
workspace: {{path: {workspace}}}
"""


@pytest.fixture(scope="module")
def artifact(once):
    def make(root):
        from gemma_deploy.compile import compile_recipe
        from gemma_deploy.recipe import Recipe

        checkpoint = tiny(root / "checkpoint", "gemma3_text")
        text = RECIPE.format(checkpoint=checkpoint, workspace=root / "workspace")
        compile_recipe(Recipe.from_text(text), parity=False)

    return once("finetune-int8", make) / "workspace" / "tiny"


@pytest.fixture(scope="module")
def checkpoint(artifact):
    return Checkpoint.open(artifact.parent.parent / "checkpoint")


def test_the_model_computes_with_the_weights_of_the_artifact(artifact, checkpoint, tmp_path):
    """Against a float model with the dequantized weights, gradients of the inputs too."""
    weights = ArtifactWeights(checkpoint.config, artifact, Artifact.open(artifact).manifest)
    asked = settings(tmp_path, tmp_path, base=str(artifact))
    model = load_model(asked, checkpoint, tmp_path)
    plain = load_model(settings(tmp_path, tmp_path), checkpoint, tmp_path)
    assert sum(isinstance(one, DequantizedLinear) for one in model.modules()) == 7 * 7
    with torch.no_grad():
        for name, value in plain.named_parameters():
            if name in weights.tensors:
                value.copy_(torch.from_numpy(weights.rows(name, 0, value.shape[0])))
    ids = torch.arange(20)[None]
    found = []
    for one in (model, plain):
        embedded = one.get_input_embeddings()(ids).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.square().mean().backward()
        found.append((one(input_ids=ids).logits.detach(), embedded.grad))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_rounding_again_gives_the_codes_of_a_compile(artifact, checkpoint):
    weights = ArtifactWeights(checkpoint.config, artifact, Artifact.open(artifact).manifest)
    name = "model.layers.1.mlp.up_proj"
    codes, scale = weights.codes(f"{name}.weight")
    made, scales = quantized(torch.from_numpy(checkpoint.rows(f"{name}.weight", 0, len(codes))), weights.form_of(name))
    assert np.array_equal(made.numpy(), codes)
    assert np.allclose(scales.numpy(), scale, rtol=1e-6)


def test_only_the_adapter_is_trained_and_the_other_way_is_measured(artifact, checkpoint, tmp_path):
    held = write_lines(tmp_path / "held.jsonl", [{"text": text} for text in TEXTS[:2]])
    asked = settings(
        texts_file(tmp_path), tmp_path / "out", lora=LORA, base=str(artifact), eval_data=str(held), max_length=LENGTH
    )
    result = finetune(asked, checkpoint.path)
    outcome = result.outcome
    assert outcome.loss_after < outcome.loss_before
    assert np.isfinite(outcome.loss_merged)
    assert outcome.loss_merged != outcome.loss_after
    assert all("lora_" in name for name in adapter_of(result.adapter))
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"gemma-deploy run {artifact} --adapter" in page
    assert "merged and quantized again" in page


def test_another_base_is_refused(artifact, checkpoint, tmp_path, genai_artifact):
    data = texts_file(tmp_path)
    for changes, said in (
        ({"base": str(tmp_path)}, "no finished artifact"),
        ({"base": str(artifact), "method": "full"}, "full on the codes of an artifact is not built"),
        ({"base": str(artifact), "lora": {"dora": True}}, "DoRA on the codes of an artifact is not built"),
        ({"base": str(genai_artifact("gemma3_text", "fp32"))}, "is not the checkpoint this artifact was made from"),
    ):
        with pytest.raises(DeployError) as raised:
            finetune(settings(data, tmp_path / "out", max_length=LENGTH, **changes), checkpoint.path)
        assert said in str(raised.value)
