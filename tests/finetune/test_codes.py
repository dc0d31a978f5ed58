"""LoRA on the codes of an artifact: it is trained on what the artifact computes with, and nothing is rounded again."""

import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.finetune.codes import DequantizedLinear, open_base, quantized
from gemma_deploy.finetune.model import load_model
from gemma_deploy.finetune.run import finetune
from gemma_deploy.parity.cases import Case
from tests.finetune.make import TEXTS, adapter_of, settings, texts_file, tiny, write_lines
from tests.runtime.make import compile_tiny

LORA = {"r": 4, "alpha": 8}
LENGTH = 64
RECIPE = """\
name: tiny
frontend: {{checkpoint: {checkpoint}, shape: {{input_ids: [[64], [128]]}}}}
backend: {{type: onnxruntime, dtype: int8}}
adapters: {{rank: 8}}
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


def with_weights_of(artifact, checkpoint):
    """Transformers' class with the dequantized weights of an artifact, float32."""
    from transformers import AutoModelForCausalLM

    weights = ArtifactWeights(checkpoint.config, artifact, Artifact.open(artifact).manifest)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.from_numpy(weights.rows(name, 0, value.shape[0])))
    return model


def test_the_model_computes_with_the_weights_of_the_artifact(artifact, checkpoint, tmp_path):
    """Against a float model with the dequantized weights, gradients of the inputs too."""
    asked = settings(tmp_path, tmp_path, base=str(artifact), lora=LORA)
    model = load_model(asked, checkpoint, tmp_path, base=open_base(artifact, checkpoint, 4))
    plain = with_weights_of(artifact, checkpoint)
    assert sum(isinstance(one, DequantizedLinear) for one in model.modules()) == 7 * 7
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


def loss_merged_by_peft(artifact, checkpoint, adapter):
    """PEFT merges into the float weights, rows are rounded to 255 steps, transformers gives the loss."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    floats = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, attn_implementation="eager")
    merged = PeftModel.from_pretrained(floats, adapter).merge_and_unload().state_dict()
    model, tokenizer = with_weights_of(artifact, checkpoint).eval(), AutoTokenizer.from_pretrained(adapter)
    total, count = 0.0, 0
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".layers." in name and value.dim() == 2:
                step = merged[name].abs().amax(1, keepdim=True) / 127
                value.copy_((merged[name] / step).round() * step)
        for text in TEXTS[:2]:
            ids = tokenizer(text + "<eos>", return_tensors="pt").input_ids
            assert ids.shape[1] <= LENGTH
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


def test_only_the_adapter_is_trained_and_the_other_way_is_measured(artifact, checkpoint, tmp_path):
    held = write_lines(tmp_path / "held.jsonl", [{"text": text} for text in TEXTS[:2]])
    asked = settings(
        texts_file(tmp_path), tmp_path / "out", lora=LORA, base=str(artifact), eval_data=str(held), max_length=LENGTH
    )
    result = finetune(asked, checkpoint.path)
    outcome = result.outcome
    assert outcome.loss_after < outcome.loss_before
    # measured: 7 digits alike; the two ways differ in the fourth
    assert outcome.loss_merged == pytest.approx(loss_merged_by_peft(artifact, checkpoint, result.adapter), rel=2e-6)
    assert abs(outcome.loss_merged / outcome.loss_after - 1) > 1e-5
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
        ({"base": str(artifact), "lora": {"r": 9}}, "it takes adapters of rank 8 at most, and finetune.lora.r is 9"),
        ({"base": str(genai_artifact("gemma3_text", "fp32"))}, "is not the checkpoint this artifact was made from"),
    ):
        with pytest.raises(DeployError) as raised:
            finetune(settings(data, tmp_path / "out", max_length=LENGTH, **changes), checkpoint.path)
        assert said in str(raised.value)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["texts.jsonl"]


def test_a_float_artifact_without_adapters_is_refused_with_both(tmp_path, genai_artifact):
    floats = genai_artifact("gemma3_text", "fp32")
    own = Checkpoint.open(floats.parent.parent / "checkpoint")
    with pytest.raises(UsageError) as raised:
        open_base(floats, own, 4)
    assert raised.value.problems == (
        "its weights are fp32, not int8 or int4 codes",
        "its recipe has no section adapters: what is trained could not run beside it",
    )
    assert "-s adapters.rank=4" in str(raised.value)


@pytest.mark.slow
def test_factors_in_the_weights_are_refused(tmp_path):
    recipe = {"adapters": {"rank": 4}, "dataset": {"nsamples": 4, "seqlen": 32},
              "frontend": {"quantize": {"type": "w8a8"}}}  # fmt: skip
    calibrated = compile_tiny(tmp_path, "gemma3_text", {"type": "onnxruntime", "dtype": "int8"}, recipe=recipe)
    with pytest.raises(UsageError) as raised:
        open_base(calibrated, Checkpoint.open(tmp_path / "checkpoint"), 4)
    assert raised.value.problems == (
        "factors were moved from activations into its weights: its linears read other numbers",
    )


def test_the_adapter_runs_beside_the_artifact_it_was_trained_on(artifact, checkpoint, tmp_path):
    """Logits of the engine against PEFT on transformers' class with the artifact's dequantized weights, past 8 keys."""
    from peft import PeftModel

    copy = shutil.copytree(artifact, tmp_path / artifact.name)  # the adapter is kept in it
    result = finetune(
        settings(texts_file(tmp_path), tmp_path / "out", lora=LORA, base=str(copy), max_length=LENGTH), checkpoint.path
    )
    model = PeftModel.from_pretrained(with_weights_of(artifact, checkpoint), result.adapter).eval()
    ids = [2, *np.random.default_rng(1).integers(3, 4000, 24).tolist()]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
        with model.disable_adapter():
            without = model(torch.tensor([ids])).logits[0].numpy()
    engine = open_engine(copy)
    source = engine.source("strict", engine.load_adapter(result.adapter))
    found = source.head(source.run([Case("text", (tuple(ids),), ((),))])[0][0])
    apart = np.abs(found - expected).max() / np.abs(expected).max()
    assert apart <= 1e-5  # measured: 1.7e-6
    assert np.abs(without - expected).max() / np.abs(expected).max() > 1e-2
