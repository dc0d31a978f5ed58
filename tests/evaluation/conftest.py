"""A checkpoint with a tokenizer, artifacts of it in every form, and transformers' logits to compare with.

Everything independent of the package is here: the tokenizer is called directly, the model is transformers' own.
"""

import json
import shutil

import numpy as np
import pytest

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.compile import compile_recipe
from gemma_deploy.recipe import Recipe
from gemma_deploy.testing import write_tiny_checkpoint
from tests import making
from tests.calibration.make import story
from tests.evaluation.make import write_tokenizer
from tests.exporting import DYNAMIC_SIZES, SIZES
from tests.test_divided import make_divided

SEQLEN = 24  # three sliding windows of 8
BOS = 2
DTYPES = {"w8a16": "int8", "fp32": "fp32"}
# And "divided", fp32 in two stages of two ranks, and "kernels", int8 for ONNX Runtime.
FORMS = {"int8": ("w8a16", False), "dynamic": ("fp32", True)}


@pytest.fixture(scope="session")
def checkpoint(once):
    """A random Gemma 3 (window 8, seven layers) with a tokenizer; read only."""

    def make(folder):
        write_tiny_checkpoint(folder, "gemma3_text")
        write_tokenizer(folder)

    return once("evaluated-checkpoint", make)


@pytest.fixture(scope="session")
def compiled(once, artifacts, checkpoint):
    """The name of a form -> an artifact of the checkpoint in it, without gate; read only."""

    def get(form):
        if form == "divided":
            return once("evaluated-divided", lambda out: adopt(once("divided", make_divided), checkpoint, out))
        if form == "kernels":
            return once("evaluated-kernels", lambda out: compile_whole(checkpoint, out)) / "artifact"
        scheme, dynamic = FORMS[form]
        graphs = artifacts("gemma3_text", scheme, dynamic=dynamic)
        return once(f"evaluated-{form}", lambda out: finish(graphs, checkpoint, scheme, dynamic, out))

    return get


def compile_whole(checkpoint_dir, out):
    """An artifact for ONNX Runtime."""
    recipe = Recipe.from_text(
        f"name: x\nfrontend: {{checkpoint: {checkpoint_dir}, shape: {{input_ids: [[32], [64]]}}}}\n"
        "backend: {type: onnxruntime, dtype: int8}\n"
    )
    compile_recipe(recipe, out=out / "artifact", parity=False)


def finish(graphs, checkpoint_dir, scheme, dynamic, out):
    prefill, context = DYNAMIC_SIZES if dynamic else SIZES
    recipe = Recipe.from_text(
        f"name: {out.name}\n"
        f"frontend:\n  checkpoint: {checkpoint_dir}\n"
        f"  shape: {{input_ids: [[{prefill}], [{context}]], batch: 2, dynamic: {str(dynamic).lower()}}}\n"
        f"backend: {{dtype: {DTYPES[scheme]}}}\n"
    )
    making.finish(recipe, graphs, out)


def adopt(made, checkpoint_dir, out):
    """Copy an artifact of the same weights, and give it the checkpoint that has a tokenizer."""
    shutil.copytree(made / "artifact", out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint_dir / file, out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["recipe"]["frontend"]["checkpoint"] = str(checkpoint_dir)
    opened = Checkpoint.open(checkpoint_dir)
    manifest["checkpoint"]["fingerprint_without_times"] = opened.fingerprint(times=False)
    (out / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def copy_of(compiled, tmp_path):
    """(form) -> a copy to write into."""
    return lambda form: shutil.copytree(compiled(form), tmp_path / "artifact")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Some hundred tokens."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(" ".join(story(n)) for n in range(8)), encoding="utf-8")
    return file


def tokens_of(checkpoint, text):
    """Tokens by the tokenizers library alone, no BOS."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.encode(text, add_special_tokens=False).ids


def stock_model(checkpoint, change=lambda name, weight: weight):
    """transformers' model in float32 with eager attention.

    Args:
        change: name and float32 array -> the array that is computed with.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.from_numpy(change(name, weight.numpy().copy())))
    return model


def logits_of(model, ids):
    """float64 [len(ids), V]."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].double().numpy()


def rounded(name, weight):
    """int8 per row, written anew: every matrix, the token table too."""
    if weight.ndim != 2:
        return weight
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
    return (np.clip(np.rint(weight / scale), -127, 127) * scale).astype(np.float32)


def exact_figures(reference, test, windows):
    """Perplexities, KL and top-1 in float64, from all logits at once."""
    nll, kl, same = [], [], []
    for window in windows:
        log_p, log_q = (log_softmax(logits_of(model, window)[:-1]) for model in (reference, test))
        targets = np.arange(len(window) - 1), np.array(window[1:])
        nll.append(np.stack([-log_p[targets], -log_q[targets]], 1))
        kl.append((np.exp(log_p) * (log_p - log_q)).sum(1))
        same.append(log_p.argmax(1) == log_q.argmax(1))
    nll = np.concatenate(nll)
    return {
        "perplexity_reference": np.exp(nll[:, 0].mean()),
        "perplexity": np.exp(nll[:, 1].mean()),
        "perplexity_error": np.exp(nll[:, 1].mean()) * nll[:, 1].std(ddof=1) / np.sqrt(len(nll)),
        "kl_mean": np.concatenate(kl).mean(),
        "top1": np.concatenate(same).mean(),
        "scored_tokens": len(nll),
    }


def log_softmax(logits):
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def run(capfd, *arguments):
    """The program: (exit code, stdout, stderr), never a traceback."""
    from gemma_deploy.cli import main

    code = main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return code, out, err
