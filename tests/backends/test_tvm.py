"""The static pair compiled by TVM: its loops against float64, its library against transformers' own classes."""

import hashlib
import json
import platform
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from gemma_deploy import extras
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.tvm import target
from gemma_deploy.backends.tvm.options import TvmOptions
from gemma_deploy.cli import main
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import ArtifactError, UsageError
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import write_tokenizer

needs_tvm = pytest.mark.skipif(not extras.installed("tvm"), reason="apache-tvm is not installed")
needs_linker = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ linker")
P, C = 48, 96  # six windows of 8, and as many steps
EM_AARCH64 = 183  # of an ELF header
EPSILON = float(np.finfo(np.float32).eps)
SHARE_ERROR = 2e-6  # of a share; measured 1.2e-6 for rows of 49 to 128, nearly all of it fast_exp's
SMALL = {
    "gemma": {"num_hidden_layers": 2},
    "gemma2": {"num_hidden_layers": 2},
    "gemma3_text": {"num_hidden_layers": 3, "sliding_window_pattern": 3},
}  # heads are 4, KV heads 1 in the first, 2 in the others; windows of 8 but in the first; caps in the second


def recipe_of(root, checkpoint, scheme, compiled=None, batch=1):
    quantize = {} if scheme == "fp32" else {"quantize": {"type": scheme}}
    recipe = {
        "name": scheme,
        "frontend": {
            "checkpoint": str(checkpoint), "shape": {"input_ids": [[P], [C]], "batch": batch}, **quantize
        },
        "backend": {"type": "tvm", "dtype": "int8" if quantize else scheme, "compile": compiled or {}},
        "parity": {"prompt_tokens": 24, "decode_tokens": 12},
        "workspace": {"path": str(root)},
    }  # fmt: skip
    file = root / f"{scheme}.yaml"
    file.write_text(json.dumps(recipe))
    return file


def compiled_to(root, scheme, generation, *words, compiled=None, batch=1, **config):
    """An artifact, and its checkpoint."""
    root.mkdir(parents=True, exist_ok=True)
    write_tokenizer(write_tiny_checkpoint(root / "ck", generation, **{**SMALL[generation], **config}))
    assert main(["compile", str(recipe_of(root, root / "ck", scheme, compiled, batch)), *words]) == 0
    return root / scheme, root / "ck"


@pytest.fixture(scope="module")
def made(once):
    """(scheme, generation) -> what `compiled_to` gives, with its gate; read only. Gemma 2 reads two texts at once."""

    def make(scheme, generation="gemma3_text"):
        batch = 2 if generation == "gemma2" else 1
        root = once(f"tvm-{scheme}-{generation}", lambda root: compiled_to(root, scheme, generation, batch=batch))
        return root / scheme, root / "ck"

    return make


@pytest.fixture(scope="module")
def elsewhere(once):
    """An artifact for another machine."""
    triple = "aarch64-linux-gnu" if platform.machine() != "aarch64" else "x86_64-linux-gnu"
    compiled = {"triple": triple}
    return once("tvm-elsewhere", lambda root: compiled_to(root, "w8a16", "gemma", compiled=compiled)) / "w8a16"


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


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def text_of(count, seed):
    return [2, *map(int, np.random.default_rng(seed).integers(5, 400, count - 1))]


# Loops


def computed(function, *arrays, shape):
    """What a function of loops gives."""
    import tvm

    given = [tvm.runtime.tensor(array) for array in arrays]
    out = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    kind = tvm.target.Target(target.llvm_target(target.own_triple(), target.own_cpu()))
    built = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target=kind)
    built["main"](*given, out)
    return out.numpy()


PRODUCTS = {
    "one row of codes": {"m": 1, "n": 96, "k": 64, "shared": True, "dtype": "int8", "scaled": True},
    "few rows of codes, odd sizes": {"m": 3, "n": 33, "k": 50, "shared": True, "dtype": "int8", "scaled": True},
    "codes without scales": {"m": 2, "n": 31, "k": 7, "shared": True, "dtype": "int8"},
    "one row and one matrix for each": {"batch": 4, "m": 1, "n": 49, "k": 32, "shared": False},
    "few columns": {"batch": 2, "m": 40, "n": 5, "k": 13, "shared": False},
    "few rows, shared": {"batch": 3, "m": 5, "n": 64, "k": 128, "shared": True},
    "rows of codes": {"m": 48, "n": 96, "k": 64, "shared": True, "dtype": "int8", "scaled": True},
    "rows of codes, odd sizes": {"m": 17, "n": 19, "k": 23, "shared": True, "dtype": "int8", "scaled": True},
    "rows, shared, unscaled": {"m": 24, "n": 40, "k": 31, "shared": True},
    "scores": {"batch": 3, "m": 48, "n": 48, "k": 32, "shared": False},
    "scores, odd sizes": {"batch": 2, "m": 21, "n": 35, "k": 9, "shared": False, "scaled": True},
    "sums of values": {"batch": 3, "m": 48, "n": 32, "k": 48, "shared": False, "transposed": False},
    "sums of values of one row": {"batch": 3, "m": 1, "n": 32, "k": 97, "shared": False, "transposed": False},
    "not transposed, shared, scaled": {
        "batch": 2, "m": 7, "n": 11, "k": 5, "shared": True, "scaled": True, "transposed": False
    },
}  # fmt: skip


@needs_tvm
@pytest.mark.parametrize("of", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_is_that_of_float64(of):
    from gemma_deploy.backends.tvm.kernels import Product

    of = Product(**{"batch": 1, **of})
    rng = np.random.default_rng(1)
    matrices = 1 if of.shared else of.batch
    first = rng.standard_normal((of.batch, of.m, of.k), np.float32)
    shape = (matrices, of.n, of.k) if of.transposed else (matrices, of.k, of.n)
    second = rng.integers(-128, 128, shape, np.int8) if of.dtype == "int8" else rng.standard_normal(shape, np.float32)
    scales = rng.uniform(0.01, 0.2, of.n).astype(np.float32)
    arrays = [first, second, *([scales] if of.scaled else [])]
    found = computed(of.built(), *arrays, shape=(of.batch, of.m, of.n))
    wide = [array.astype(np.float64) for array in (first, second.swapaxes(1, 2) if of.transposed else second)]
    factor = scales.astype(np.float64) if of.scaled else 1.0
    expected = wide[0] @ wide[1] * factor
    most = (of.k + 1) * EPSILON / 2 * (np.abs(wide[0]) @ np.abs(wide[1])) * factor  # whatever the order of sums
    assert (np.abs(found - expected) <= most).all()


@needs_tvm
@pytest.mark.parametrize(("rows", "size"), [(1, 97), (8, 49), (96, 48), (4, 128), (3, 1)])
def test_softmax_is_that_of_float64(rows, size):
    from gemma_deploy.backends.tvm.kernels import softmax

    rng = np.random.default_rng(2)
    scores = rng.standard_normal((rows, size), np.float32) * 4
    scores[::2] += 300.0  # more than float32 can raise e to
    scores[rng.uniform(size=scores.shape) < 0.3] = np.finfo(np.float32).min  # masked
    scores[:, -1] = scores.max(axis=1) - 1
    scores[rows // 2] = np.finfo(np.float32).min  # all of them: a row of padding
    found = computed(softmax(rows, size), scores, shape=(rows, size))
    raised = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True).astype(np.float64))
    expected = raised / raised.sum(axis=1, keepdims=True)
    assert (np.abs(found - expected) <= SHARE_ERROR * expected + np.finfo(np.float32).tiny).all()


# Models


@needs_tvm
@needs_linker
@pytest.mark.parametrize("generation", SMALL)
def test_prompt_and_steps_have_the_logits_of_transformers(made, generation):
    from gemma_deploy.backends.tvm.runner import open_runner

    artifact, checkpoint = made("fp32", generation)
    runner = open_runner(artifact)
    rows = [text_of(count, seed) for seed, count in enumerate((P, 29)[: runner.batch])]
    forced = [text_of(20, 7 + row)[1:] for row in range(len(rows))]
    for prompts in (rows, rows[::-1]):  # the second finds what the first left in caches
        found = [runner.prefill(prompts)]
        found += [runner.step([row[step] for row in forced]) for step in range(19)]
        for place, prompt in enumerate(prompts):
            (expected,) = stock_logits(checkpoint, ([*prompt, *forced[place]],))
            assert relative(np.stack([step[place] for step in found]), expected[len(prompt) - 1 :]) < 1e-5


@needs_tvm
@needs_linker
@pytest.mark.parametrize(
    "what", [("fp32", "gemma"), ("fp32", "gemma2"), ("fp32", "gemma3_text"), ("w8a16", "gemma3_text")]
)
def test_an_artifact_is_proven(made, what):
    artifact, _ = made(*what)
    parity = json.loads((artifact / "manifest.json").read_text())["parity"]
    assert parity["passed"]
    exact = [row for row in parity["measures"] if row["test"] == "strict" and row["reference"].startswith("patched")]
    assert exact
    assert all(row["relative"] < 1e-5 for row in exact)
    assert main(["verify", str(artifact)]) == 0


@needs_tvm
@needs_linker
def test_run_says_what_transformers_says(made, capsys):
    import torch

    artifact, checkpoint = made("fp32", "gemma3_text")
    engine = open_engine(Artifact.open(artifact))
    prompt = text_of(30, 7)
    with torch.inference_mode():
        expected = stock(checkpoint).generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :]
    session, other = engine.session(endless=True), engine.session(endless=True)
    for again in (session, other, session):
        again.reset()
        tokens = [int(np.argmax(again.read(prompt)))]
        while len(tokens) < len(expected):
            tokens.append(int(np.argmax(again.read(tokens[-1:]))))
        assert tokens == expected.tolist()
    assert main(["run", str(artifact), "-p", "Text", "-n", "6"]) == 0
    assert capsys.readouterr().out


@needs_tvm
@needs_linker
def test_every_token_has_the_logits_of_transformers(made):
    from gemma_deploy.parity.cases import Case

    artifact, checkpoint = made("fp32", "gemma3_text")
    row = text_of(P, 3)
    source = open_engine(Artifact.open(artifact)).source()
    ((found,),) = source.run([Case("text", [row], [[]])])
    assert relative(found, stock_logits(checkpoint, (row,))[0]) < 1e-5
    with pytest.raises(UsageError, match="no 'fast' to evaluate"):
        open_engine(Artifact.open(artifact)).source("fast")


@needs_tvm
@needs_linker
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is mapped")
def test_codes_stay_bytes_where_their_file_is_mapped(made):
    from gemma_deploy.backends.tvm.runner import CompiledGraphs

    artifact, _ = made("w8a16", "gemma3_text")
    graphs = CompiledGraphs(artifact)
    weights = graphs.opened().weights["iter1"]
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [
        tuple(int(end, 16) for end in words[0].split("-"))
        for words in lines
        if words[-1] == str(artifact / "params.safetensors") and words[1].startswith("r--")
    ]
    assert spans
    matrices = [np.from_dlpack(weight) for weight in weights if len(weight.shape) == 2 and min(weight.shape) >= 64]
    assert len(matrices) >= 7 * 3
    assert {array.dtype.name for array in matrices} <= {"int8"}
    for array in matrices:
        assert any(first <= array.ctypes.data and array.ctypes.data + array.nbytes <= last for first, last in spans)


@needs_tvm
@needs_linker
@pytest.mark.parametrize("graph", ["iter0", "iter1"])
def test_the_gate_sees_weights_that_a_function_should_not_have(made, tmp_path, capsys, graph):
    copy = tmp_path / "copy"
    shutil.copytree(made("w8a16", "gemma3_text")[0], copy)
    rows = {row.name: row for row in Artifact.open(copy).manifest.params}
    swap_weights(copy / f"{graph}.onnx", *(rows[f"model.layers.0.mlp.{one}_proj.scale"] for one in ("gate", "up")))
    sign(copy, f"{graph}.onnx")
    assert main(["parity", str(copy)]) == 1
    assert "patched w8a16 = strict" in capsys.readouterr().err


def sign(artifact, name):
    """Let the manifest say that a file is what was written."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    written = (artifact / name).read_bytes()
    manifest["files"][name] |= {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    (artifact / "manifest.json").write_text(json.dumps(manifest))


def swap_weights(file, first, second):
    """Let a graph read one weight in the place of another of the same shape."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset" and entry.value == str(first.offset):
                entry.value = str(second.offset)
                onnx.save(model, file)
                return
    raise AssertionError(f"{file} has no {first.name}")


@needs_tvm
@needs_linker
def test_the_gate_sees_a_library_of_another_model(made, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(made("w8a16", "gemma3_text")[0], copy)
    wide, _ = compiled_to(tmp_path / "wide", "w8a16", "gemma3_text", "--no-parity", sliding_window=9)
    shutil.copy(wide / "model.so", copy / "model.so")
    sign(copy, "model.so")
    assert main(["parity", str(copy)]) == 1
    assert "patched w8a16 = strict" in capsys.readouterr().err


@needs_tvm
def test_another_machine_gets_object_files_that_are_not_run(elsewhere, capsys):
    wanted = EM_AARCH64 if platform.machine() != "aarch64" else 62
    with tarfile.open(elsewhere / "model.tar") as tar:
        objects = [tar.extractfile(member).read(20) for member in tar if member.name.endswith(".o")]
    assert objects
    for head in objects:
        assert head[:4] == b"\x7fELF"
        assert int.from_bytes(head[18:20], "little") == wanted
    assert not (elsewhere / "model.so").exists()
    manifest = json.loads((elsewhere / "manifest.json").read_text())
    assert manifest["parity"]["passed"]
    assert manifest["contract"]["cpu"] == "generic"
    assert main(["parity", str(elsewhere)]) == 0
    assert "was not run" in " ".join("".join(capsys.readouterr()).split())
    assert main(["run", str(elsewhere), "-p", "x"]) == 2
    assert "was compiled for another machine" in capsys.readouterr().err
    assert main(["verify", str(elsewhere)]) == 0


@needs_tvm
@needs_linker
def test_a_processor_below_the_level_of_the_library_is_told(made, monkeypatch, capsys):
    artifact, _ = made("fp32", "gemma3_text")
    if target.own_cpu() in ("generic", "x86-64"):
        pytest.skip("this processor has no level above the first")
    monkeypatch.setattr(target, "flags", set)
    assert main(["run", str(artifact), "-p", "x"]) == 2
    assert f"the library is for processors of the level {target.LEVELS[0][0][:6]}" in capsys.readouterr().err


@needs_tvm
@needs_linker
@pytest.mark.parametrize("damage", [b"", b"x" * 5000], ids=["empty", "no library"])
def test_a_damaged_library_is_an_error_of_the_artifact(made, tmp_path, damage):
    from gemma_deploy.backends.tvm.runner import open_runner

    copy = tmp_path / "copy"
    shutil.copytree(made("fp32", "gemma3_text")[0], copy)
    library = copy / "model.so"
    library.write_bytes(damage)
    with pytest.raises(ArtifactError, match="damaged"):
        open_runner(copy).prefill([[2, 5]])
    library.unlink()
    with pytest.raises(ArtifactError):
        open_runner(copy).prefill([[2, 5]])


# What is refused


@pytest.mark.parametrize(
    ("generation", "keys", "says"),
    [
        ("gemma3_text", {"frontend": {"quantize": {"type": "w8a16+kv8"}}}, "remove +kv8"),
        ("gemma3_text", {"frontend": {"quantize": {"type": "w4a16"}}}, "w4a16 is not built on tvm"),
        ("gemma3_text", {"frontend": {"quantize": {"type": "w8a8"}}}, "w8a8 is not built on tvm"),
        (
            "gemma3_text",
            {"frontend": {"quantize": {"type": "w8a16", "calib_args": {"groupsize": 32}}}},
            "frontend.quantize.calib_args.groupsize: tvm multiplies",
        ),
        ("gemma3_text", {"frontend": {"quantize": {"type": "w8a16", "table": "int8_g32"}}}, "frontend.quantize.table"),
        (
            "gemma3_text",
            {"frontend": {"shape": {"input_ids": [[P], [C]], "dynamic": True}}},
            "frontend.shape.dynamic: loops are made for fixed sizes",
        ),
        ("gemma3_text", {"split": {"points": [1]}}, "is not divided"),
        ("gemma3_text", {"adapters": {"rank": 8}}, "merge with frontend.adapter"),
        ("gemma3_text", {"backend": {"compile": {"tripel": "x"}}}, "backend.compile.tripel"),
        ("gemma3_text", {"backend": {"compile": {"cpu": "-mattr=+x y"}}}, "backend.compile.cpu"),
        ("vaultgemma", {}, "tvm is not built for VaultGemma: it is for Gemma 1, Gemma 2, Gemma 3"),
        ("gemma4_text", {}, "tvm is not built for Gemma 4"),
    ],
)
def test_what_is_not_built_is_refused_before_any_work(tmp_path, capsys, generation, keys, says):
    write_tokenizer(write_tiny_checkpoint(tmp_path / "ck", generation))
    recipe = json.loads(recipe_of(tmp_path, tmp_path / "ck", "w8a16").read_text())
    for section, values in keys.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(recipe))
    assert main(["compile", str(file)]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("w8a16*/*"))


def test_without_tvm_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    write_tokenizer(write_tiny_checkpoint(tmp_path / "ck", "gemma", **SMALL["gemma"]))
    monkeypatch.setattr(extras, "_missing", lambda extra: ["tvm"] if extra == "tvm" else [])
    assert main(["compile", str(recipe_of(tmp_path, tmp_path / "ck", "w8a16"))]) == 2
    assert 'pip install "gemma-deploy[tvm]"' in capsys.readouterr().err
    assert not list(tmp_path.glob("w8a16*/params.safetensors"))


@needs_tvm
@needs_linker
def test_an_artifact_without_tvm_says_what_to_install(made, monkeypatch, capsys):
    artifact, _ = made("fp32", "gemma3_text")
    monkeypatch.setattr(extras, "_missing", lambda extra: ["tvm"] if extra == "tvm" else [])
    for words in (["run", str(artifact), "-p", "x"], ["parity", str(artifact)]):
        assert main(words) == 2
        assert "gemma-deploy[tvm]" in capsys.readouterr().err


@needs_tvm
def test_without_a_linker_it_says_so_before_any_work(tmp_path, monkeypatch, capsys):
    write_tokenizer(write_tiny_checkpoint(tmp_path / "ck", "gemma", **SMALL["gemma"]))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["compile", str(recipe_of(tmp_path, tmp_path / "ck", "w8a16"))]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no compiler is installed that could" in said
    assert "apt install g++" in said
    assert not list(tmp_path.glob("w8a16*/params.safetensors"))


@needs_tvm
@pytest.mark.parametrize(
    ("compiled", "says"),
    [
        ({"triple": "nonsense-linux-gnu"}, "backend.compile.triple: LLVM has no machine nonsense"),
        ({"cpu": "x86-64-v5"}, "backend.compile.cpu: LLVM has no processor x86-64-v5"),
        ({"triple": "aarch64-linux-gnu", "cpu": "x86-64-v3"}, "LLVM has no processor x86-64-v3 of aarch64-linux-gnu"),
    ],
)
def test_a_machine_that_llvm_does_not_know_is_refused_before_any_work(tmp_path, capsys, compiled, says):
    write_tokenizer(write_tiny_checkpoint(tmp_path / "ck", "gemma", **SMALL["gemma"]))
    assert main(["compile", str(recipe_of(tmp_path, tmp_path / "ck", "w8a16", compiled))]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("w8a16*/params.safetensors"))


@needs_tvm
def test_machines_that_llvm_knows_are_taken():
    for triple, cpu in (("aarch64-linux-gnu", "cortex-a76"), ("x86_64-linux-gnu", "znver4"), ("riscv64", "generic")):
        target.require_known(triple, cpu)


@needs_tvm
def test_a_library_for_another_processor_is_not_proven_here(monkeypatch):
    from tvm.target import codegen

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(target, "flags", lambda: V3)
    monkeypatch.setattr(codegen, "llvm_get_system_cpu", lambda: "znver3")
    own = "x86_64-linux-gnu"
    assert [target.runs_here(own, cpu) for cpu in ("x86-64-v2", "x86-64-v3", "znver3", "generic")] == [True] * 4
    assert [target.runs_here(own, cpu) for cpu in ("x86-64-v4", "znver4", "sapphirerapids")] == [False] * 3
    assert not target.runs_here("aarch64-linux-gnu", "generic")


@needs_tvm
@needs_linker
def test_it_guesses_nothing_ahead(made, capsys):
    artifact, _ = made("fp32", "gemma3_text")
    assert main(["run", str(artifact), "-p", "x", "--lookup"]) == 2
    assert "takes one token" in capsys.readouterr().err


# Processors

V2 = {"cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"}
V3 = V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("machine", "has", "level"),
    [
        ("x86_64", set(), "x86-64"),
        ("x86_64", V2 | {"sse2"}, "x86-64-v2"),
        ("x86_64", V3 | {"avx_vnni"}, "x86-64-v3"),
        ("x86_64", V3 - {"movbe"}, "x86-64-v2"),  # as some virtual machines have it
        ("x86_64", V4, "x86-64-v4"),
        ("x86_64", V4 - {"fma"}, "x86-64-v2"),  # a level needs those below
        ("aarch64", {"asimd"}, "generic"),
    ],
)
def test_a_processor_has_the_highest_level_of_which_it_has_all(monkeypatch, machine, has, level):
    monkeypatch.setattr(target, "flags", lambda: has)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert target.own_cpu() == target.cpu_of(TvmOptions()) == level
    assert target.triple_of(TvmOptions()) == f"{machine}-linux-gnu"
    assert target.missing_level(level) == set()
    assert target.cpu_of(TvmOptions(triple="riscv64-linux-gnu")) == "generic"
    assert target.cpu_of(TvmOptions(triple="riscv64-linux-gnu", cpu="x")) == "x"


def test_what_a_lower_processor_lacks_is_named(monkeypatch):
    monkeypatch.setattr(target, "flags", lambda: V3)
    assert target.missing_level("x86-64-v4") == V4 - V3
    assert target.missing_level("x86-64-v3") == target.missing_level("znver4") == target.missing_level("") == set()
    monkeypatch.setattr(target, "flags", lambda: V2)
    assert target.missing_level("x86-64-v4") == V4 - V2


def test_flags_are_those_of_the_first_processor(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(target, "CPUINFO", file)
    assert target.flags() == set()
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t\t: none\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert target.flags() == {"fpu", "avx2", "fma"}
