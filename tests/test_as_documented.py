"""What the documents of SplitLearn and of the vendor's flow tell people to write, run as it is written there.

Names of packages, programs and paths are changed as the README says, and nothing else: `splitlearn` is
`gemma_deploy.split`, `vamc` is `gemma-deploy`, `build_in/build` is `build_in/vendor`.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from gemma_deploy.backends.tvm_vacc.runner import StaticRunner
from gemma_deploy.cli import main
from gemma_deploy.testing import write_tiny_checkpoint
from gemma_deploy.verifying import verify
from tests.calibration import make

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{text.stem}-{number}")
    for text in TEXTS
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text.read_text(encoding="utf-8"), re.DOTALL))
    if "gemma_deploy.split" in block
]


# --- the split model

SPLIT = """
from gemma_deploy.split import ModelFactory
from transformers import AutoTokenizer

bottom, trunk, top = ModelFactory.create_split_models(
    model_type='gemma',
    model_name_or_path='google/gemma-2b',
    split_point_1=6,
    split_point_2=12,
    device='cpu'
)

tokenizer = AutoTokenizer.from_pretrained('google/gemma-2b')
input_ids = tokenizer.encode("Hello", return_tensors="pt")

with torch.no_grad():
    h1 = bottom(input_ids)
    h2 = trunk(h1)
    output = top(h2)
"""
COMPARISON = """
from transformers import AutoModelForCausalLM

full_model = AutoModelForCausalLM.from_pretrained('google/gemma-2b')

with torch.no_grad():
    full_output = full_model(input_ids)

    h1 = bottom(input_ids)
    h2 = trunk(h1)
    split_output = top(h2)

    diff = torch.abs(full_output.logits - split_output.logits).max()
    assert diff < 1e-4, f"output differs: {diff}"
"""
LOOP = """
generated_ids = input_ids.clone()
for i in range(20):
    with torch.no_grad():
        h1 = bottom(generated_ids)
        h2 = trunk(h1)
        output = top(h2)
    next_token_id = output.logits[0, -1].argmax(dim=-1).unsqueeze(0).unsqueeze(0)
    generated_ids = torch.cat([generated_ids, next_token_id], dim=1)
"""


@pytest.fixture
def gemma_2b(tmp_path, monkeypatch):
    """`google/gemma-2b` in the current directory: a tiny one of 18 layers, float32, so that no dtype is to be said."""
    path = write_tiny_checkpoint(
        tmp_path / "google" / "gemma-2b", "gemma", num_hidden_layers=18, dtype="F32", torch_dtype="float32"
    )
    make.write_tokenizer(path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return path


def test_the_split_model_as_its_document_uses_it(gemma_2b):
    names = {"torch": torch}
    exec(SPLIT, names)
    whole = AutoModelForCausalLM.from_pretrained(gemma_2b, attn_implementation="eager")
    with torch.no_grad():
        expected = whole(names["input_ids"]).logits
    got = names["output"].logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert len(names["bottom"].get_transformer_blocks()) == len(names["trunk"].get_transformer_blocks()) == 6
    exec(COMPARISON, names)
    exec(LOOP, names)
    written = whole.generate(names["input_ids"], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(names["generated_ids"], written)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_of_our_own_documents_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    if "output" in names:
        assert names["output"].logits.shape[-1] == 4096
    if "model" in names and "new" in names:
        whole = names["model"].generate(names["input_ids"], max_new_tokens=names["new"].shape[1], do_sample=False)
        assert torch.equal(whole[:, names["input_ids"].shape[1] :], names["new"])


def test_our_documents_hold_that_code():
    assert any("output.logits" in block.values[0] for block in BLOCKS)
    assert any("top.generate(" in block.values[0] for block in BLOCKS)


# --- the vendor's flow

KV8 = """
name: gemma-2b-it-kv8-tp4-1024-2048
frontend:
  checkpoint: /path/to/gemma-2b-it
  type: huggingface
  shape:
    input_ids: [[1024], [2048]]
  model_kwargs: {b2s: true, tp: 4, model_arch: vacc}
  quantize: {type: w16kv8}
backend:
  type: tvm_vacc
  dtype: int8
  merge_params: true
  compile: {data_type: 0, gather_data_vccl_dsp_enable: true}
workspace: {path: ./vacc_deploy, workers: 4}
"""
# Every key of the public tools/vamc/vamc_quant.yaml, with its values.
QUANT = """
name: llm
frontend:
  checkpoint: /path/to/gemma-2b-it
  type: huggingface
  shape: {input_ids: [[512], [1024]]}
  quantize: {type: w8a16_gptq, device: 'cuda:5', calib_args: {true_sequential: false}}
backend:
  type: tvm_vacc
  dtype: int8
  merge_params: true
  compile: {data_type: 0}
dataset: {type: huggingface, nsamples: 128, name: alpaca, path: /path/to/en_alpaca_data.json, seqlen: 512}
workspace: {path: vamc_results, workers: 1}
"""
RECIPES = ["hf_gemma_fp16", "hf_gemma_int8", "kv8", "vamc_quant"]


@pytest.fixture
def gemma(tmp_path, monkeypatch):
    """The vendor's folder: build_in/vendor/ and workspace/, which is the current directory, and a Gemma of one KV head.

    Only the paths of checkpoint and data are changed in the recipes.
    """
    checkpoint = write_tiny_checkpoint(
        tmp_path / "gemma-2b-it", "gemma", num_hidden_layers=2, max_position_embeddings=8192, dtype="F32"
    )
    make.write_tokenizer(checkpoint)
    data = make.write_alpaca(tmp_path / "en_alpaca_data.json", make.alpaca_entries(2000))
    folder = tmp_path / "gemma" / "build_in" / "vendor"
    folder.mkdir(parents=True)
    shipped = {file.stem: file.read_text(encoding="utf-8") for file in (ROOT / "build_in" / "vendor").glob("*.yaml")}
    for name, text in {**shipped, "kv8": KV8, "vamc_quant": QUANT}.items():
        text = text.replace("/path/to/gemma-2b-it", str(checkpoint)).replace("/path/to/en_alpaca_data.json", str(data))
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "gemma" / "workspace").mkdir()
    monkeypatch.chdir(tmp_path / "gemma" / "workspace")
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_the_vendors_recipes_can_be_done(gemma, name, capsys, caplog):
    with caplog.at_level("DEBUG", logger="gemma_deploy"):
        assert main(["-v", "compile", f"../build_in/vendor/{name}.yaml", "--dry-run"]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "this machine can do it" in shown
    assert ("frontend.quantize.device" in caplog.text) == (name == "vamc_quant")
    repeated = "the model's 1 key/value head is repeated to 4, 1 in each rank"
    assert (repeated in caplog.text) == (name != "vamc_quant")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_vendors_recipes_compile(gemma, name, capsys):
    assert main(["compile", f"../build_in/vendor/{name}.yaml"]) == 0, capsys.readouterr().err
    recipe = yaml.safe_load((gemma / f"{name}.yaml").read_text())
    artifact = Path(recipe["workspace"]["path"]) / recipe["name"]
    verify(artifact)  # raises where something is wrong
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["parity"]["passed"]
    assert manifest["int8_cache"] == (name == "kv8")
    ranks = recipe["frontend"].get("model_kwargs", {}).get("tp", 1)
    assert [part["contract"]["kv_heads"] for part in manifest["parts"]] == [1] * ranks * (ranks > 1)
    whats = [entry["what"] for entry in manifest["ledger"]]
    assert ("1 key/value heads are stored as 4" in whats) == (ranks == 4)
    logits = StaticRunner(artifact).prefill([list(range(2, 40))])
    assert np.isfinite(logits).all()


def test_the_patched_files_beside_the_weights(gemma, tmp_path, capsys):
    """Step 1: modeling files and auto_map beside the weights, `quantize` with one scale per row."""
    checkpoint = tmp_path / "gemma-2b-it"
    assert main(["stage", str(checkpoint), "staged"]) == 0, capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained("staged", trust_remote_code=True, dtype=torch.float32).eval()
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32)
    assert type(model).__module__.endswith("modeling_gemma_vacc")
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = whole(ids).logits
        assert torch.equal(model(ids).logits, expected)
        model.quantize(8)
        got = model(ids).logits
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert 0 < (got - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_calibration_data_by_its_own_names(gemma, tmp_path, capsys):
    """Step 2: the files as they are called where they are downloaded."""
    make.write_c4(Path("c4-train.00000-of-01024.json.gz"))
    make.write_ceval(Path("ceval-exam.zip"))
    make.write_alpaca(Path("alpaca_data_cleaned.json"))
    places = "c4=c4-train.00000-of-01024.json.gz,ceval=ceval-exam.zip,alpaca=alpaca_data_cleaned.json"
    mixed = ["--dataset", "c4:2,ceval:2,alpaca:2", "--path", places, "--seqlen", "32"]
    done = main(["calibrate", *mixed, "--checkpoint", str(tmp_path / "gemma-2b-it")])
    assert done == 0, capsys.readouterr().err
    assert "6 windows of 32 tokens" in capsys.readouterr().out
