"""Models for OpenVINO: what its runtime and openvino-genai compute, against transformers' own classes."""

import json
import math
import platform
import re
import shutil
from collections import Counter

import numpy as np
import pytest

from gemma_deploy import extras
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.backends.openvino.backend import BACKEND, OpenVino
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.cli import main
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import UsageError
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import write_tokenizer

KINDS = ("gemma", "gemma2", "gemma3_text")  # windows of 8 in the last two, caps in the second
needs_openvino = pytest.mark.skipif(not extras.installed("openvino"), reason="OpenVINO is not installed")
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "EXECUTION_MODE_HINT": "ACCURACY",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


def recipe_of(root, checkpoint, scheme, compiled=None, **keys):
    quantize = {} if scheme in ("bf16", "fp16", "fp32") else {"quantize": {"type": scheme, **keys}}
    recipe = {
        "name": scheme,
        "frontend": {"checkpoint": str(checkpoint), "shape": {"input_ids": [[48], [96]]}, **quantize},
        "backend": {"type": "openvino", "dtype": "int8" if quantize else scheme, "compile": compiled or {}},
        "parity": {"prompt_tokens": 24, "decode_tokens": 8},
        "workspace": {"path": str(root)},
    }
    file = root / f"{scheme}.yaml"
    file.write_text(json.dumps(recipe))
    return file


def compiled_to(root, scheme, generation, *, proven=False, config=None, **keys):
    """An artifact without a converted tokenizer, and its checkpoint; `config`: keys of its own."""
    words = [] if proven else ["--no-parity"]
    changes = {"num_hidden_layers": 4, "sliding_window_pattern": 3} if generation == "gemma3_text" else {}
    write_tokenizer(write_tiny_checkpoint(root / "ck", generation, **changes, **(config or {})))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenVino, "converter", None)
        assert main(["compile", str(recipe_of(root, root / "ck", scheme, **keys)), *words]) == 0
    return root / scheme, root / "ck"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(scheme, generation) -> what `compiled_to` gives."""
    known = {}

    def make(scheme, generation="gemma3_text"):
        if (scheme, generation) not in known:
            known[scheme, generation] = compiled_to(tmp_path_factory.mktemp(scheme), scheme, generation)
        return known[scheme, generation]

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """generation -> an artifact in float32 with everything that openvino-genai reads."""
    known = {}

    def make(generation):
        if generation not in known:
            root = tmp_path_factory.mktemp(generation)
            changes = {"num_hidden_layers": 4, "sliding_window_pattern": 3} if generation == "gemma3_text" else {}
            write_tokenizer(write_tiny_checkpoint(root / "ck", generation, **changes))
            assert main(["compile", str(recipe_of(root, root / "ck", "fp32")), "--no-parity"]) == 0
            known[generation] = root / "fp32"
        return known[generation]

    return make


def stock(checkpoint):
    """transformers' own class, eager."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()


def stock_logits(checkpoint, rows):
    """[tokens, V] of each row."""
    import torch

    model = stock(checkpoint)
    with torch.inference_mode():
        return [np.asarray(model(torch.tensor([row])).logits[0]) for row in rows]


class Request:
    """The model as anybody opens it."""

    def __init__(self, artifact, **options):
        import openvino as ov

        core = ov.Core()
        self.compiled = core.compile_model(
            core.read_model(artifact / "openvino_model.xml"), "CPU", {**EXACT, **options}
        )
        self.request = self.compiled.create_infer_request()

    def __call__(self, ids, mask, beams=None):
        ids, mask = np.array(ids, np.int64), np.array(mask, np.int64)
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        beams = np.arange(len(ids)) if beams is None else np.array(beams)
        fed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "beam_idx": beams.astype(np.int32)}
        return np.array(self.request.infer(fed)["logits"])


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@needs_openvino
@pytest.mark.parametrize("generation", KINDS)
def test_padded_rows_in_pieces_have_the_logits_of_transformers(made, generation):
    artifact, checkpoint = made("fp32", generation)
    rng = np.random.default_rng(5)
    long, short = ([2, *map(int, rng.integers(5, 400, count))] for count in (28, 19))
    expected = stock_logits(checkpoint, (long, short))
    request, padding = Request(artifact), len(long) - len(short)
    ids, mask = [long, [0] * padding + short], [[1] * len(long), [0] * padding + [1] * len(short)]
    found = []
    for start, stop in ((0, 14), (14, 26), (26, 27), (27, 28), (28, 29)):
        found.append(request([row[start:stop] for row in ids], [row[:stop] for row in mask]))
    found = np.concatenate(found, axis=1)
    assert relative(found[0], expected[0]) < 1e-5
    assert relative(found[1, padding:], expected[1]) < 1e-5


@needs_openvino
@pytest.mark.parametrize(
    ("generation", "config"),
    [
        ("gemma2", {"hidden_activation": "gelu"}),
        ("gemma3_text", {"tie_word_embeddings": False}),
        ("gemma3_text", {"num_key_value_heads": 4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("gemma3_text", {"query_pre_attn_scalar": 24, "final_logit_softcapping": 3.0}),
        ("vaultgemma", {}),
    ],
)
def test_what_a_config_may_say_else(tmp_path, generation, config):
    artifact, checkpoint = compiled_to(tmp_path, "fp32", generation, config=config)
    row = [2, *map(int, np.random.default_rng(4).integers(5, 400, 25))]
    (expected,) = stock_logits(checkpoint, (row,))
    assert relative(Request(artifact)([row], np.ones((1, len(row))))[0], expected) < 1e-5


@needs_openvino
def test_rows_of_the_cache_are_taken_as_beams_say(made):
    artifact, checkpoint = made("fp32", "gemma3_text")
    rng = np.random.default_rng(6)
    first, second = ([2, *map(int, rng.integers(5, 400, 12))] for _ in range(2))
    request = Request(artifact)
    request([first, second], np.ones((2, 13)))
    found = request([[77], [78]], np.ones((2, 14)), beams=[1, 1])
    expected = stock_logits(checkpoint, ([*second, 77], [*second, 78]))
    for row, wanted in zip(found, expected, strict=True):
        assert relative(row[-1], wanted[-1]) < 1e-5


@needs_openvino
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have other kernels")
@pytest.mark.parametrize("generation", KINDS)
def test_openvino_finds_its_kernels(made, generation):
    artifact, _ = made("w8a16", generation)
    layers = Artifact.open(artifact).manifest.model.num_hidden_layers
    nodes = Request(artifact).compiled.get_runtime_model().get_ordered_ops()
    kinds = Counter(node.get_rt_info()["layerType"].astype(str) for node in nodes)
    norms = {"gemma": 2, "gemma2": 4, "gemma3_text": 6}[generation] * layers + 1
    assert (kinds["RMS"], kinds["RoPE"], kinds["FullyConnected"]) == (norms, 2 * layers, 7 * layers + 1)
    assert kinds["ScaledDotProductAttention"] == (0 if generation == "gemma2" else layers)
    constants = [node for node in nodes if node.get_rt_info()["layerType"].astype(str) == "Const"]
    matrices = [node for node in constants if math.prod(node.get_output_shape(0)) >= 32 * 64]
    assert {node.get_output_element_type(0).get_type_name() for node in matrices} == {"i8"}  # none became floats


@needs_openvino
@pytest.mark.parametrize(
    ("scheme", "generation"),
    [
        ("w8a16", "gemma"), ("w8a16", "gemma3_text"), ("w4a16_rtn", "gemma2"), ("bf16", "gemma3_text"),
        ("fp16", "gemma2"),
    ],
)  # fmt: skip
def test_an_artifact_is_proven(tmp_path, scheme, generation):
    artifact, _ = compiled_to(tmp_path, scheme, generation, proven=True)
    parity = json.loads((artifact / "manifest.json").read_text())["parity"]
    assert parity["passed"]
    assert {row["test"] for row in parity["measures"]} >= {"strict", "shipped"}
    exact = [row for row in parity["measures"] if row["test"] == "strict" and row["reference"].startswith("patched")]
    if scheme != "fp16":
        assert exact
    assert all(row["relative"] < 5e-6 for row in exact)
    assert main(["verify", str(artifact)]) == 0


@needs_openvino
def test_calibrated_codes_with_factors_of_columns_are_proven(tmp_path):
    write_tokenizer(write_tiny_checkpoint(tmp_path / "ck", "gemma3_text", num_hidden_layers=2))
    recipe = json.loads(recipe_of(tmp_path, tmp_path / "ck", "w8a16_gptq", table="int8").read_text())
    recipe["dataset"] = {"name": "c4", "nsamples": 4, "seqlen": 32}
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenVino, "converter", None)
        assert main(["compile", str(file)]) == 0
    artifact = tmp_path / "w8a16_gptq"
    assert "model.embed_tokens.column_scale" in (artifact / "openvino_model.xml").read_text()


@needs_openvino
@pytest.mark.parametrize("what", ["window", "table", "norm"])
def test_the_gate_sees_a_wrong_graph(made, tmp_path, capsys, what):
    copy = tmp_path / "copy"
    shutil.copytree(made("w8a16", "gemma3_text")[0], copy)
    file, rows = copy / "openvino_model.xml", {row.name: row for row in Artifact.open(copy).manifest.params}
    text = file.read_text()
    if what == "window":  # masks of sliding layers are replaced by those of full ones
        masks = re.findall(r'<layer id="(\d+)" name="Slice_\d+"', text)
        users = {
            one: len(re.findall(rf'from-layer="{one}" from-port="5" to-layer="\d+" to-port="3"/>', text))
            for one in masks
        }
        sliding, full = sorted((one for one in users if users[one]), key=lambda one: -users[one])
        text = text.replace(f'from-layer="{sliding}" from-port="5"', f'from-layer="{full}" from-port="5"')
    else:
        first, second = {
            "table": ("model.layers.0.mlp.gate_proj.scale", "model.layers.0.mlp.up_proj.scale"),
            "norm": ("model.layers.1.input_layernorm.weight", "model.layers.2.input_layernorm.weight"),
        }[what]
        text = text.replace(f'offset="{rows[first].offset}"', f'offset="{rows[second].offset}"')
    assert text != file.read_text()
    file.write_text(text)
    assert main(["parity", str(copy)]) == 1
    assert "patched w8a16 = strict" in capsys.readouterr().err


@needs_openvino
@pytest.mark.parametrize("generation", KINDS)
def test_run_says_what_transformers_says(made, generation, capsys):
    import torch

    artifact, checkpoint = made("fp32", generation)
    engine = open_engine(Artifact.open(artifact))
    rng = np.random.default_rng(7)
    prompt = [2, *map(int, rng.integers(5, 400, 20))]
    with torch.inference_mode():
        expected = stock(checkpoint).generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :]
    session = engine.session(endless=True)
    rows = [session.read(prompt)]
    for token in expected[:-1]:
        rows.append(session.read([int(token)]))
    logits = [expected_row for expected_row in stock_logits(checkpoint, ([*prompt, *map(int, expected)],))[0]]
    for row, wanted in zip(rows, logits[len(prompt) - 1 :], strict=False):
        assert relative(row, wanted) < 0.03  # activations may be bfloat16
    assert main(["run", str(artifact), "-p", "Text", "-n", "6"]) == 0
    assert capsys.readouterr().out


@needs_openvino
def test_a_text_can_be_set_back(made):
    artifact, _ = made("fp32", "gemma3_text")
    sequence = open_engine(Artifact.open(artifact)).session()._new_sequence()
    tokens = [2, *range(30, 52)]
    sequence.read(tokens)
    first = np.array(sequence.feed([99, 98]))
    sequence.length = len(tokens)
    sequence.feed([97])
    sequence.length = len(tokens)
    again = np.array(sequence.feed([99, 98]))
    assert sequence.length == len(tokens) + 2
    assert relative(again, first) < 1e-3


@needs_openvino
@pytest.mark.parametrize("generation", KINDS)
def test_openvino_genai_takes_it_and_keeps_the_window(whole, generation):
    genai = pytest.importorskip("openvino_genai")
    import openvino as ov

    artifact = whole(generation)
    checkpoint = artifact.parent / "ck"
    prompt = [2, *map(int, np.random.default_rng(8).integers(5, 400, 40))]
    asked = genai.GenerationConfig()
    asked.max_new_tokens, asked.ignore_eos = 10, True
    texts = {}
    for attention in ("SDPA", "PA"):
        unasked = generation == "gemma2" and attention == "PA"  # which has no capped scores: it takes the other way
        options = {} if unasked else {"ATTENTION_BACKEND": attention}
        pipeline = genai.LLMPipeline(str(artifact), "CPU", INFERENCE_PRECISION_HINT="f32", **options)
        texts[attention] = list(pipeline.generate(ov.Tensor(np.array([prompt], np.int64)), asked).tokens[0])
    (logits,) = stock_logits(checkpoint, ([*prompt, *texts["PA"]],))
    for place, token in enumerate(texts["PA"]):
        row = logits[len(prompt) - 1 + place]
        assert row[token] > row.max() - 1e-2
    assert texts["PA"] == texts["SDPA"]


@needs_openvino
@pytest.mark.parametrize("generation", ["gemma2", "gemma3_text"])
def test_rows_of_a_batch_in_openvino_genai_say_what_they_say_alone(whole, generation):
    genai = pytest.importorskip("openvino_genai")
    import openvino as ov

    rng, asked = np.random.default_rng(9), genai.GenerationConfig()
    asked.max_new_tokens, asked.ignore_eos = 8, True
    rows = [[2, *map(int, rng.integers(5, 400, count))] for count in (30, 21)]
    options = {"ATTENTION_BACKEND": "SDPA", "INFERENCE_PRECISION_HINT": "f32"}
    pipeline = genai.LLMPipeline(str(whole(generation)), "CPU", **options)
    alone = [list(pipeline.generate(ov.Tensor(np.array([row], np.int64)), asked).tokens[0]) for row in rows]
    ids, mask = np.zeros((2, 31), np.int64), np.zeros((2, 31), np.int64)
    for place, row in enumerate(rows):
        ids[place, 31 - len(row) :], mask[place, 31 - len(row) :] = row, 1
    together = pipeline.generate(genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(mask)), asked).tokens
    assert [list(row) for row in together] == alone


@needs_openvino
def test_tokens_are_those_of_the_tokenizer(tmp_path, caplog):
    import openvino as ov
    import openvino_tokenizers  # noqa: F401 - brings the operators

    assert main(["compile", str(recipe_of(tmp_path, "demo", "w8a16")), "--no-parity"]) == 0
    assert "makes the tokens" not in caplog.text
    artifact, core = tmp_path / "w8a16", ov.Core()
    convert = core.compile_model(artifact / "openvino_tokenizer.xml", "CPU")
    back = core.compile_model(artifact / "openvino_detokenizer.xml", "CPU")
    own = open_engine(Artifact.open(artifact)).tokenizer
    for text in (
        "Return the value",
        "  two  spaces\n\nlines\t",
        "<start_of_turn>user\nHi",
        "caf\u00e9 \u65e5\u672c",
        "",
    ):
        ids = list(own.encode(text))
        assert list(convert([text])["input_ids"][0]) == ids, text
        assert back([np.array([ids], np.int64)])[0][0] == own.decode(ids)
    short, long = convert(["Return", "Return the value of the message"])["input_ids"]
    assert list(long[-2:]) == list(own.encode("Return the value of the message"))[-2:]
    assert short[-1] == own.encode("Return")[-1]  # padded on the left


@needs_openvino
def test_a_tokenizer_that_puts_no_bos_in_front_is_told_of(tmp_path, caplog):
    write_tokenizer(write_tiny_checkpoint(tmp_path / "ck", "gemma", num_hidden_layers=1))
    assert main(["compile", str(recipe_of(tmp_path, tmp_path / "ck", "fp32")), "--no-parity"]) == 0
    assert "openvino-genai makes the tokens" in caplog.text


def test_the_weights_are_a_safetensors_file_with_everything_once(made):
    from safetensors import safe_open

    artifact, checkpoint = made("w4a16_rtn", "gemma2")
    manifest = Artifact.open(artifact).manifest
    weights, source = (
        ArtifactWeights(Checkpoint.open(checkpoint).config, artifact, manifest),
        Checkpoint.open(checkpoint),
    )
    with safe_open(artifact / "openvino_model.bin", "np") as file:
        assert set(file.keys()) == {row.name for row in manifest.params}
        codes = file.get_tensor("model.embed_tokens.weight")
    rows = source.tensors["model.embed_tokens.weight"].shape[0]
    np.testing.assert_array_equal(codes, weights.codes("model.embed_tokens.weight")[0])
    original = source.rows("model.embed_tokens.weight", 0, rows)
    scale = np.repeat(weights.codes("model.embed_tokens.weight")[1], original.shape[1], axis=1)[:, : original.shape[1]]
    assert (np.abs(weights.rows("model.embed_tokens.weight", 0, rows) - original) <= 0.51 * scale.max()).all()
    text = (artifact / "openvino_model.xml").read_text()
    for row in manifest.params:
        if row.name != "openvino.constants":
            assert f'offset="{row.offset}" size="{row.nbytes}"' in text, row.name


@pytest.mark.parametrize("where", ["header", "constants", "tensor", "graph", "offset"])
def test_verify_sees_a_bit_that_changed(made, tmp_path, capsys, where):
    artifact, _ = made("w8a16", "gemma3_text")
    assert main(["verify", str(artifact)]) == 0
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    manifest = Artifact.open(copy).manifest
    row = {one.name: one for one in manifest.params}
    if where in ("graph", "offset"):
        file = copy / "openvino_model.xml"
        norm = row["model.norm.weight"]
        text = file.read_text()
        other = row["model.layers.0.input_layernorm.weight"].offset if where == "offset" else norm.offset + 1
        file.write_text(text.replace(f'offset="{norm.offset}"', f'offset="{other}"'))
    else:
        file = copy / "openvino_model.bin"
        content = bytearray(file.read_bytes())
        at = {"header": content.index(b"gate_proj"), "constants": row["openvino.constants"].offset + 3}
        content[at.get(where, row["model.layers.1.mlp.up_proj.weight"].offset)] ^= 1
        file.write_bytes(content)
    assert main(["verify", str(copy)]) == 1
    said = {
        "header": "the header differs", "constants": "openvino.constants: sha256", "tensor": "up_proj.weight: sha256",
        "graph": "that are no tensor's", "offset": "reads model.layers.0.input_layernorm.weight",
    }  # fmt: skip
    assert said[where] in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("generation", "pipeline"), [("gemma3_text", None), ("gemma2", "LM")])
def test_it_is_served_by_openvinos_server(made, capsys, generation, pipeline):
    artifact, _ = made("w8a16", generation)
    capsys.readouterr()
    assert main(["serve-command", str(artifact), "--port", "8000"]) == 0
    words = capsys.readouterr().out.split()
    assert words[:5] == ["ovms", "--model_path", str(artifact), "--model_name", "w8a16"]
    assert words[words.index("--rest_port") + 1] == "8000"
    assert (words[words.index("--pipeline_type") + 1] if "--pipeline_type" in words else None) == pipeline
    assert main(["serve-command", str(artifact), "--tensor-parallel-size", "2"]) == 2
    assert "served by one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("generation", "keys", "says"),
    [
        ("gemma3_text", {"frontend": {"quantize": {"type": "w8a8"}}}, "backend.compile.round_inputs: true"),
        ("gemma3_text", {"frontend": {"quantize": {"type": "w8a16+kv8"}}}, "backend.compile.cache: u8"),
        ("gemma3_text", {"split": {"points": [1]}}, "is not divided"),
        ("gemma3_text", {"adapters": {"rank": 8}}, "merge with frontend.adapter"),
        ("gemma3_text", {"backend": {"compile": {"cache": "int8"}}}, "backend.compile.cache"),
        ("gemma3_text", {"backend": {"compile": {"cahce": "u8"}}}, "backend.compile.cahce"),
        ("gemma4_text", {}, "openvino is not built for Gemma 4: it is for Gemma 1, Gemma 2, Gemma 3, VaultGemma"),
    ],
)
def test_what_is_not_built_is_refused_before_any_work(tmp_path, capsys, monkeypatch, generation, keys, says):
    monkeypatch.setattr(OpenVino, "converter", None)
    write_tokenizer(write_tiny_checkpoint(tmp_path / "ck", generation))
    recipe = json.loads(recipe_of(tmp_path, tmp_path / "ck", "w8a16").read_text())
    for section, values in keys.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(recipe))
    assert main(["compile", str(file)]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "w8a16").exists()


def test_without_openvino_it_says_what_to_install(made, tmp_path, monkeypatch, capsys):
    artifact, checkpoint = made("w8a16", "gemma3_text")
    monkeypatch.setattr(extras, "_missing", lambda extra: ["openvino"] if extra == "openvino" else [])
    assert main(["compile", str(recipe_of(tmp_path, checkpoint, "w8a16"))]) == 2
    assert 'pip install "gemma-deploy[openvino]"' in capsys.readouterr().err
    for words in (["run", str(artifact), "-p", "x"], ["parity", str(artifact)]):
        assert main(words) == 2
        assert "gemma-deploy[openvino]" in capsys.readouterr().err
    with pytest.raises(UsageError, match="openvino"):
        open_engine(Artifact.open(artifact)).source()


def test_options_stand_in_the_model(tmp_path):
    artifact, _ = compiled_to(tmp_path, "w8a16", "gemma", compiled={"cache": "u8", "round_inputs": True})
    text = (artifact / "openvino_model.xml").read_text()
    said = dict(re.findall(r'<(\w+) value="([^"]*)"/>', text.partition("<runtime_options>")[2]))
    assert (said["KV_CACHE_PRECISION"], said["DYNAMIC_QUANTIZATION_GROUP_SIZE"]) == ("u8", "32")
    manifest = Artifact.open(artifact).manifest
    assert (manifest.contract.cache_dtype, manifest.contract.input_group) == ("uint8", 32)
    assert any("rounded to 8 bits" in entry.what for entry in BACKEND.ledger(manifest))


def test_it_guesses_nothing_ahead(made, capsys):
    artifact, _ = made("w8a16", "gemma3_text")
    assert main(["run", str(artifact), "-p", "x", "--lookup"]) == 2
    assert "cannot be set back" in capsys.readouterr().err
    with pytest.raises(UsageError, match="not set back"):
        open_engine(Artifact.open(artifact)).decider()
