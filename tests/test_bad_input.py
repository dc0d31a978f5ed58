"""Every bad input a user can bring, end to end: one message that names the file, the key or tensor, and the next step,
the exit code that was promised, no traceback, and nothing half-written."""

import errno
import json
import os
import random
import shutil

import pytest

from gemma_deploy.calibration.store import Calibration
from gemma_deploy.parity.compare import ParityResult
from gemma_deploy.parity.gates import Line
from tests import bad_input_make as make
from tests.bad_input_make import World

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
CONFIG, WEIGHTS, INDEX = "model/config.json:", "model/model.safetensors:", "model/model.safetensors.index.json:"
COPY = "next: copy or download"


@pytest.fixture
def world(tmp_path, capsys):
    return World(tmp_path, capsys)


def is_explained(outcome, code, parts):
    """One error, with every part and the next step, and nothing else that looks like a result."""
    got, shown, said = outcome
    assert got == code, said
    assert "Traceback" not in shown + said
    assert said.count("error:") == 1, said
    flat = " ".join(said.split())
    for part in (*parts, "next: "):
        assert part in flat, f"{part!r} is not in:\n{said}"


def is_refused(world, code, parts, *arguments):
    """Explained, and every file and directory is as it was."""
    before = world.files()
    is_explained(world.run(*arguments), code, parts)
    assert world.files() == before


# --- checkpoints -----------------------------------------------------------------------------------------------------

# name: (how to break it, what must be said, exit code)
CHECKPOINTS = {
    "weights cut": (
        make.cut_weights, (WEIGHTS, "model.norm.weight: offsets 35200..35264 lie outside", "35164 data", COPY), 1
    ),
    "weights empty": (make.empty_weights, (WEIGHTS, "the file is empty", COPY), 1),
    "header longer than the file": (
        make.header_longer_than_the_file,
        (WEIGHTS, "says its header is 1099511627776 bytes long", "expected: a header of at most", COPY), 1,
    ),
    "offsets outside": (make.offsets_outside, (WEIGHTS, "model.norm.weight: offsets 35274..35338 lie", COPY), 1),
    "shard missing": (
        make.missing_shard, (INDEX, "1 of 2 shards", "model-00002-of-00002.safetensors", "next: download them into"), 1
    ),
    "index names a path outside": (
        make.index_names("../elsewhere.safetensors"),
        (INDEX, "'../elsewhere.safetensors'", "nothing was opened", "expected: files beside", "next: do not"), 1,
    ),
    "index names an absolute path": (
        make.index_names("/etc/passwd"),
        (INDEX, "'/etc/passwd'", "nothing was opened", "expected: files beside", "next: do not use"), 1,
    ),
    "index not JSON": (make.index_is("{"), (INDEX, "is not JSON", "line 1", "next: repair it"), 1),
    "index a list": (make.index_is("[]"), (INDEX, "holds a list, expected an object", "next: repair it"), 1),
    "index without a map": (make.index_is("{}"), (INDEX, "weight_map is missing", "next: copy the index again"), 1),
    "pickle only": (
        make.pickle_only,
        ("model: only pickled weights (pytorch_model.bin)", "expected: model.safetensors", "next: convert them to"), 1,
    ),
    "tensor missing": (
        make.tensors_changed(make.lose),
        ("model: 1 tensor(s)", "missing: model.layers.1.mlp.up_proj.weight [24, 16]", "next: make sure config.json"), 1,
    ),
    "tensor extra": (
        make.tensors_changed(make.add),
        ("model: 1 tensor(s)", "unexpected: model.layers.9.stranger.weight [3]", "next: make sure config.json"), 1,
    ),
    "tensor misshaped": (
        make.tensors_changed(make.misshape),
        ("model: 1 tensor(s)", "model.layers.0.self_attn.q_proj.weight is [16, 16], config.json calls for [32, 16]"), 1,
    ),
    "all three at once": (
        make.tensors_changed(make.all_three),
        ("model: 3 tensor(s)", "missing: model.layers.1", "unexpected: model.layers.9", "shape: model.layers.0"), 1,
    ),
    "config missing": (
        make.no_config, (CONFIG, "is missing", "one JSON object", "next: copy config.json from where the weights"), 1
    ),
    "config not JSON": (
        make.config_is('{"model_type": "gemma",'), (CONFIG, "is not JSON", "line 1 column 24", "next: repair it"), 1
    ),
    "config a list": (make.config_is("[1]"), (CONFIG, "holds a list, expected an object", "next: repair it"), 1),
    "config a directory": (
        make.config_is_a_directory, (CONFIG, "cannot be read: Is a directory", "next: make it a file"), 1
    ),
    "model_type unknown": (
        make.config_with(model_type="llama"),
        (CONFIG, "unknown model_type 'llama'", "expected: one of gemma, gemma2, gemma3_text, gemma", "next: pass"), 1,
    ),
    "heads do not divide": (
        make.config_with(num_key_value_heads=3),
        (CONFIG, "num_attention_heads 4 is not divisible by num_key_value_heads 3", "next: take config.json from"), 1,
    ),
    "GGUF cut in its weights": (
        make.gguf("gemma3", slice(-128)), ("model.gguf:", "output_norm.weight: bytes 160..416 lie outside", COPY), 1
    ),
    "GGUF cut in its header": (make.gguf("gemma3", slice(60)), ("model.gguf:", "cut short at byte", COPY), 1),
    "GGUF of another architecture": (
        make.gguf("qwen2", slice(None)),
        ("model.gguf:", "architecture 'qwen2'", "expected: one of gemma, gemma2, gemma3", "next: pass the GGUF"), 1,
    ),
    "nothing there": (
        make.nowhere, ("nowhere: there is no such file or directory", "expected: a checkpoint", "next: check the"), 1
    ),
}  # fmt: skip
# command -> its arguments: each opens the checkpoint in its own way, all must say the same
OPENERS = {
    "compile": lambda world: ("compile", world.recipe, "--no-parity"),
    "dry run": lambda world: ("compile", world.recipe, "--dry-run"),
    "stage": lambda world: ("stage", world.checkpoint, world.workspace / "staged"),
    "inspect": lambda world: ("inspect", world.checkpoint),
    "calibrate": lambda world: (
        *("calibrate", "--dataset", "c4", "--checkpoint", world.checkpoint, "--workspace", world.workspace),
    ),
    "parity": lambda world: ("parity", "--stage", "patched", "--checkpoint", world.checkpoint),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_before_any_work(world, name):
    how, parts, code = CHECKPOINTS[name]
    how(world)
    for arguments in OPENERS.values():
        is_refused(world, code, parts, *arguments(world))


def test_the_good_checkpoint_is_taken_by_the_same_commands(world):
    """Or the refusals above would prove nothing."""
    for name in ("dry run", "stage", "inspect"):
        code, _, said = world.run(*OPENERS[name](world))
        assert (code, "error:" in said) == (DONE, False), said


NOT_A_NUMBER = {
    "NaN in a matrix": ("model.layers.2.mlp.down_proj.weight", (3, 5), float("nan"), "row 3 holds NaN"),
    "inf in a norm": ("model.layers.0.input_layernorm.weight", (2,), float("inf"), "row 2 holds infinity"),
    "inf in the table": ("model.embed_tokens.weight", (39, 15), float("-inf"), "row 39 holds infinity"),
    "NaN in the last norm": ("model.norm.weight", (0,), float("nan"), "row 0 holds NaN"),
}


@pytest.mark.parametrize("name", NOT_A_NUMBER)
@pytest.mark.parametrize("dtype", ["int8", "fp16", "bf16", "fp32"])
def test_a_weight_that_is_no_number_names_its_tensor_and_leaves_no_artifact(world, name, dtype):
    tensor, at, value, words = NOT_A_NUMBER[name]
    make.poison(tensor, at, value)(world)
    world.content["backend"]["dtype"] = dtype
    world.write_recipe()
    parts = (f"{world.checkpoint}: 1 tensor(s)", f"{tensor}: {words}", "expected: finite numbers", "next: copy or")
    is_explained(world.run("compile", world.recipe, "--no-parity"), FAILED, parts)
    assert [entry.name for entry in world.workspace.iterdir()] == ["bad.partial"]
    assert not (world.workspace / "bad.partial" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("tensor", "module"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.layers.1.mlp.down_proj.weight", "model.layers.1"),
        ("model.norm.weight", "model.norm"),
    ],
)
@pytest.mark.parametrize("bits", [b"\xc0\x7f", b"\x80\xff"], ids=["NaN", "inf"])
def test_calibrate_stores_no_range_of_a_weight_that_is_no_number(world, tensor, module, bits):
    shutil.copytree("gemma_deploy/demo", world.root / "demo")
    world.use(world.root / "demo")
    data = bytearray(world.weights.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    bos = 2 * header[tensor]["shape"][0] == 2 * 4096  # of the table, take a row that every window has: BOS
    start = 8 + size + header[tensor]["data_offsets"][0] + (2 * 2 * header[tensor]["shape"][-1] if bos else 0)
    data[start : start + 2] = bits
    world.weights.write_bytes(data)
    outcome = world.run(*OPENERS["calibrate"](world), "--nsamples", 1, "--seqlen", 8)
    parts = (f"error: {module}: gives NaN or infinity in window 0", f"its weights in {world.checkpoint} are damaged")
    is_explained(outcome, FAILED, parts)
    assert not list(world.workspace.glob("calib/*"))


@pytest.mark.parametrize(("scalar", "warned"), [(224, True), (256, False)])
def test_gemma_2_9b_with_the_older_scalar_is_a_warning(world, scalar, warned):
    folder = make.gemma_2_9b(world.root / "gemma-2-9b", scalar)
    code, shown, said = world.run("inspect", folder, "--json")
    notes = " ".join(note["note"] for note in json.loads(shown)["notes"])
    assert (code, said) == (DONE, "")
    words = f"{folder / 'config.json'}: query_pre_attn_scalar is 224; Gemma 2 9B was trained with 256"
    assert (words in notes, "set 256 in config.json" in notes) == (warned, warned)


def test_a_warning_about_the_model_is_said_once_and_stops_nothing(world, caplog):
    world.change_config(model_type="gemma3_text", sliding_window=4)  # and no query_pre_attn_scalar
    tensors = make.weights(json.loads((world.checkpoint / "config.json").read_text()))
    raw = json.loads((world.checkpoint / "config.json").read_text())
    make.write_checkpoint(world.checkpoint, raw, tensors)
    assert world.run("compile", world.recipe, "--dry-run")[0] == DONE
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    (warning,) = [text for text in warnings if "query_pre_attn_scalar" in text]
    assert str(world.checkpoint / "config.json") in warning


# --- recipes -------------------------------------------------------------------------------------------------------


def with_keys(**sections):
    """Keys set in sections of the good recipe."""

    def change(world):
        for section, keys in sections.items():
            world.content[section] = world.content.get(section, {}) | keys
        world.write_recipe()

    return change


def written(content):
    return lambda world: world.recipe.write_bytes(content)


def lengths(*input_ids):
    return with_keys(frontend={"shape": {"input_ids": list(input_ids)}})


PYTHON_TAG = b"name: x\nfrontend: !!python/object/apply:os.mkdir ['owned']\nbackend: {dtype: fp32}\n"
RECIPE = "recipe.yaml: the recipe has"
CORRECT = "next: correct the lines above"
RECIPES = {
    "typo in a key": (
        with_keys(backend={"dytpe": "int8"}),
        (RECIPE, "line 3: backend.dytpe: unknown key; did you mean `backend.dtype`?", CORRECT), 2,
    ),
    "typo in a section": (
        with_keys(wrokspace={"path": "x"}), (RECIPE, "wrokspace: unknown key; did you mean `workspace`?", CORRECT), 2
    ),
    "wrong type": (
        lengths(["many"], [32]),
        (RECIPE, "frontend.shape.input_ids[0][0]: got 'many' (text), expected a whole number", CORRECT), 2,
    ),
    "unknown value": (
        with_keys(backend={"dtype": "int4"}),
        (RECIPE, "backend.dtype: got 'int4'", "expected one of fp32, fp16, bf16, int8", CORRECT), 2,
    ),
    "length no multiple of 16": (
        lengths([20], [32]),
        (RECIPE, "frontend.shape.input_ids[0]: prefill length 20 is not a multiple of 16; nearest: 16 or 32"), 2,
    ),
    "C < P": (
        lengths([64], [32]),
        (RECIPE, "frontend.shape.input_ids: context length 32 is shorter than prefill length 64", CORRECT), 2,
    ),
    "contradictory dtype": (
        with_keys(backend={"dtype": "fp16"}, frontend={"quantize": {"type": "w8a16"}}),
        (RECIPE, "backend.dtype: fp16 contradicts frontend.quantize.type w8a16", "set backend.dtype: int8", CORRECT), 2,
    ),
    "Python tag": (
        written(PYTHON_TAG),
        (RECIPE, "line 2: frontend: YAML tag `!!python/object/apply:os.mkdir` is refused", CORRECT), 2,
    ),
    "no YAML": (written(b"name: [x\nfrontend: 3"), (RECIPE, "line 2, column 9: not valid YAML", CORRECT), 2),
    "no text": (written(b"\xff\xfe\x00"), ("recipe.yaml: is not UTF-8 text", "a YAML recipe in UTF-8", "next: "), 2),
    "empty": (written(b""), (RECIPE, "the file holds nothing, expected a mapping", CORRECT), 2),
    "a key twice": (written(b"name: x\nname: y\n"), (RECIPE, "name: the key is given twice", "line 2"), 2),
    "keys missing": (
        written(b"name: x\n"), (RECIPE, "frontend: missing, and required", "backend: missing, and required"), 2
    ),
    "not built": (
        with_keys(backend={"merge_params": False}),
        ("recipe bad:", "backend.merge_params: separate parameter files are not built yet", "next: change the keys"), 2,
    ),
    "no adapter": (
        with_keys(frontend={"adapter": "./lora"}),
        ("lora: there is no such file or directory", "adapter_config.json", "check the path (frontend.adapter"), 1,
    ),
    "no kind of adapter": (
        with_keys(frontend={"adapter": [{"path": "./lora", "scale": 2}]}),
        (RECIPE, "frontend.adapter: got a list of 1, expected a directory, or a list of directories", CORRECT), 2,
    ),
    "undefined variable": (
        with_keys(frontend={"checkpoint": "${NOWHERE_SET}"}),
        (RECIPE, "frontend.checkpoint: the environment variable NOWHERE_SET is not set", CORRECT), 2,
    ),
    "longer than the model": (
        lengths([64], [128]),
        ("recipe bad:", "frontend.shape.input_ids: context length 128", "max_position_embeddings 64", "next: "), 2,
    ),
    "not there": (
        lambda world: world.recipe.unlink(),
        ("recipe.yaml: there is no such file", "expected: the path of a YAML recipe", "gemma-deploy recipes` lists"), 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe_is_refused_before_any_work(world, name, monkeypatch):
    how, parts, code = RECIPES[name]
    how(world)
    monkeypatch.chdir(world.root)  # a Python tag that ran would leave a directory here
    is_refused(world, code, parts, "compile", world.recipe, "--no-parity")


def test_all_offenders_of_a_recipe_are_told_at_once(world):
    world.content["backend"] = {"dytpe": "int8"}
    world.content["wrokspace"] = {}
    lengths([20], [10])(world)
    parts = ("recipe has 6 problems", "backend.dytpe", "backend.dtype: missing", "prefill length 20", "wrokspace")
    is_refused(world, USAGE, parts, "compile", world.recipe)


def test_an_option_with_a_typo_is_named_like_a_key(world):
    parts = (RECIPE, "-s backend.dtpe=int8: backend.dtpe: unknown key; did you mean `backend.dtype`?")
    is_refused(world, USAGE, parts, "compile", world.recipe, "-s", "backend.dtpe=int8")


# --- the machine ---------------------------------------------------------------------------------------------------

SMALL_PARITY = ("parity", "--no-fast", "--prompt-tokens", 16, "--decode-tokens", 1)
SMALL_CALIBRATION = ("calibrate", "--dataset", "c4", "--nsamples", 1, "--seqlen", 8, "--workspace")


def left(world):
    """What is in the workspace, hidden files too, unfinished work of a compile left out."""
    found = [path for path in world.workspace.rglob("*") if path.is_file()]
    unfinished = world.workspace / "bad.partial"
    return [path for path in found if unfinished not in path.parents]


FULL_DISKS = {
    "compile, its lock": (
        "os.pwrite", make.full, lambda world: ("compile", world.recipe, "--no-parity"),
        ("workspace: cannot be written: No space left on device", "next: free space and run the same command again"),
    ),
    "compile, its parameters": (
        "os.pwrite", make.full_for_blocks(os.pwrite), lambda world: ("compile", world.recipe, "--no-parity"),
        ("bad.partial/params.safetensors: no space left for the parameters", "expected: ", "next: free space or"),
    ),
    "stage": (
        "gemma_deploy.staging._write_json", make.full,
        lambda world: ("stage", world.checkpoint, world.workspace / "staged"),
        ("workspace/staged.partial: cannot be written: No space left on device", "next: make room there"),
    ),
    "calibrate": (
        "gemma_deploy.calibration.store.save_file", make.full,
        lambda world: (*SMALL_CALIBRATION, world.workspace),
        ("workspace/calib/", "cannot be written: No space left on device", "next: make room there"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL_DISKS)
def test_a_full_disk(world, name, monkeypatch):
    where, full, arguments, parts = FULL_DISKS[name]
    monkeypatch.setattr(where, full)
    is_explained(world.run(*arguments(world)), FAILED, parts)
    assert not left(world)


def test_a_full_disk_under_a_file_of_measures(world, demo_artifact, monkeypatch):
    def full(file, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr("gemma_deploy.writing.write_bytes", full)
    before, file = world.files(), world.root / "out.json"
    parts = (f"error: {file}: No space left on device", "next: free space there")
    is_explained(world.run(*SMALL_PARITY, demo_artifact, "--json", file), FAILED, parts)
    assert world.files() == before


def test_too_little_disk_is_known_before_any_work(world, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    parts = ("disk", str(world.workspace), "next: see all stages")
    is_refused(world, FAILED, parts, "compile", world.recipe, "--no-parity")


READ_ONLY = {
    "compile": (("compile", "RECIPE", "--no-parity"), "next: set workspace.path (or --out) to a directory"),
    "stage": (("stage", "CHECKPOINT", "WORKSPACE/staged"), "next: make room there or allow writing"),
    "calibrate": ((*SMALL_CALIBRATION, "WORKSPACE"), "next: make room there or allow writing"),
}


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("name", READ_ONLY)
def test_a_read_only_workspace(world, name, number, monkeypatch):
    real = os.mkdir

    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(world.workspace)):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refuse)
    arguments, step = READ_ONLY[name]
    named = {"RECIPE": world.recipe, "CHECKPOINT": world.checkpoint, "WORKSPACE": world.workspace}
    named["WORKSPACE/staged"] = world.workspace / "staged"
    parts = (str(world.workspace), os.strerror(number), step)
    is_refused(world, FAILED, parts, *(named.get(argument, argument) for argument in arguments))


@pytest.mark.parametrize("name", READ_ONLY)
def test_a_file_where_the_workspace_should_be(world, name):
    world.workspace.write_text("a file")
    arguments, _ = READ_ONLY[name]
    named = {"RECIPE": world.recipe, "CHECKPOINT": world.checkpoint, "WORKSPACE": world.workspace}
    named["WORKSPACE/staged"] = world.workspace / "staged"
    is_refused(world, FAILED, (str(world.workspace),), *(named.get(argument, argument) for argument in arguments))


INTERRUPTIONS = {
    "compile": ("gemma_deploy.compile.write_parameters", lambda world: ("compile", world.recipe, "--no-parity")),
    "stage": (
        "gemma_deploy.staging.write_tokenizer",
        lambda world: ("stage", world.checkpoint, world.workspace / "staged"),
    ),
    "calibrate": (
        "gemma_deploy.calibration.store.save_file", lambda world: (*SMALL_CALIBRATION, world.workspace)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_ctrl_c_is_one_line_and_130(world, name, monkeypatch):
    where, arguments = INTERRUPTIONS[name]
    monkeypatch.setattr(where, make.interrupted)
    code, _, said = world.run(*arguments(world))
    assert code == INTERRUPTED
    assert said.splitlines()[-1] == "interrupted; run the same command again to continue where it stopped"
    assert "Traceback" not in said
    assert not left(world)


# --- artifacts -----------------------------------------------------------------------------------------------------

VERIFY, INSPECT, PARITY = ("verify",), ("inspect",), SMALL_PARITY
RUN = ("run", "-p", "Return the", "-n", "2")
AGAIN = "next: compile the recipe again with --force"
OTHER = ("manifest.json: format_version is 7", "expected: 2", "next: compile the recipe with this version")
NO_MANIFEST = ("manifest.json is missing: this is no finished artifact", "next: compile the recipe again")
BAD_KEY = (
    "manifest.json: is damaged",
    "contract.prefill: field required",
    "expected: what `gemma-deploy compile` wrote",
)
CUT = ("params.safetensors has 1000 bytes, expected 1759744", AGAIN)
# name: (how to break it, {command: what must be said})
ARTIFACTS = {
    "one bit of a weight": (
        make.flip_weight("model.layers.3.mlp.down_proj.weight"),
        {
            VERIFY: ("model.layers.3.mlp.down_proj.weight: sha256 is", "in params.safetensors, expected", AGAIN),
            PARITY: ("first differs in model.layers.3.mlp.down_proj", "must be <=", "next: `gemma-deploy verify"),
        },
    ),
    "one bit of a graph": (
        make.flip("iter0.onnx"), dict.fromkeys([VERIFY, RUN], ("iter0.onnx: sha256 differs from the manifest", AGAIN))
    ),
    "one bit of the tokenizer": (
        make.flip("tokenizer.json"), dict.fromkeys([VERIFY, RUN], ("tokenizer.json: sha256 differs", AGAIN))
    ),
    "one bit of the manifest": (make.flip_manifest_key, dict.fromkeys([VERIFY, RUN, PARITY, INSPECT], BAD_KEY)),
    "weights cut": (make.cut("params.safetensors"), dict.fromkeys([VERIFY, RUN, PARITY, INSPECT], CUT)),
    "graph cut": (
        make.cut("iter1.onnx"),
        dict.fromkeys([VERIFY, RUN, PARITY, INSPECT], ("iter1.onnx has 1000 bytes, expected", AGAIN)),
    ),
    "graph missing": (
        make.without("iter1.onnx"),
        dict.fromkeys([VERIFY, INSPECT], ("iter1.onnx is missing", AGAIN))
        | dict.fromkeys([RUN, PARITY], ("/iter1.onnx: is missing", "next: run `gemma-deploy verify`")),
    ),
    "weights missing": (
        make.without("params.safetensors"),
        dict.fromkeys([VERIFY, INSPECT], ("params.safetensors is missing", AGAIN))
        | dict.fromkeys([RUN, PARITY], ("/params.safetensors: is missing", "next: run `gemma-deploy verify`")),
    ),
    "config missing": (
        make.without("config.json"), dict.fromkeys([VERIFY, INSPECT], ("config.json is missing", AGAIN))
    ),
    "tokenizer missing": (
        make.without("tokenizer.json"),
        dict.fromkeys([VERIFY, INSPECT], ("tokenizer.json is missing", AGAIN))
        | {RUN: ("/tokenizer.json: the tokenizer is missing", "next: copy tokenizer.json")},
    ),
    "manifest missing": (
        make.without("manifest.json"), dict.fromkeys([VERIFY, RUN, PARITY, INSPECT], NO_MANIFEST)
    ),
    "manifest cut": (
        make.cut("manifest.json"),
        dict.fromkeys([VERIFY, RUN, PARITY, INSPECT], ("manifest.json: is not JSON", "line", AGAIN)),
    ),
    "another version": (
        make.manifest_with(format_version=7), dict.fromkeys([VERIFY, RUN, PARITY, INSPECT], OTHER)
    ),
    "not there": (
        shutil.rmtree,
        dict.fromkeys([VERIFY, RUN, PARITY], ("there is no such directory", "expected: an artifact", "next: list the")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_bad_artifact(world, demo_copy, name):
    how, commands = ARTIFACTS[name]
    how(demo_copy)
    for (command, *options), parts in commands.items():
        code = USAGE if name == "not there" else FAILED
        is_refused(world, code, (str(demo_copy), *parts), command, demo_copy, *options)


def test_a_gate_that_passes_does_not_excuse_a_flipped_bit(world, demo_copy, monkeypatch):
    """The prompts need not bring a damaged weight out: a bit of layer 2's up_proj passed every gate of the demo."""
    passed = ParityResult([Line("hf = strict", "relative error", 0.0, 1.0, True)])
    monkeypatch.setattr("gemma_deploy.proving.requests.artifact_stage", lambda *paths, **request: passed)
    monkeypatch.setattr("gemma_deploy.proving.requests.two_artifacts", lambda *paths, **request: passed)
    other = shutil.copytree(demo_copy, world.root / "other")
    assert world.run("parity", demo_copy, "--against", other)[0] == DONE
    make.flip_weight("model.layers.2.mlp.up_proj.weight")(other)
    parts = (str(other), "model.layers.2.mlp.up_proj.weight: sha256 is", "in params.safetensors", AGAIN)
    is_refused(world, FAILED, parts, "parity", other)
    is_refused(world, FAILED, parts, "parity", demo_copy, "--against", other)
    assert world.run("parity", demo_copy)[0] == DONE


def test_inspect_shows_what_the_manifest_says_before_it_names_what_is_missing(world, demo_copy):
    (demo_copy / "iter1.onnx").unlink()
    code, shown, said = world.run("inspect", demo_copy, "--json")
    assert (code, json.loads(shown)["artifact"]["scheme"]) == (FAILED, "w8a16")
    assert "iter1.onnx is missing" in said


def test_no_bit_of_the_manifest_ends_in_a_traceback(world, demo_copy):
    file = demo_copy / "manifest.json"
    good, dice, codes = file.read_bytes(), random.Random(0), []
    for _ in range(100):
        data = bytearray(good)
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        file.write_bytes(data)
        outcome = world.run("inspect", demo_copy, "--json")
        codes.append(outcome[0])
        if outcome[0] != DONE:
            is_explained(outcome, FAILED, (str(demo_copy),))
    assert FAILED in codes


def test_a_manifest_that_may_not_be_read(world, demo_copy, monkeypatch):
    read = os.open

    def denied(path, *args, **kwargs):
        if str(path).endswith("manifest.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    for command, *options in (VERIFY, RUN, PARITY, INSPECT):
        parts = (f"{demo_copy / 'manifest.json'}: cannot be read: Permission denied", "next: allow reading it")
        is_refused(world, FAILED, parts, command, demo_copy, *options)


def test_a_prompt_longer_than_the_artifact_takes(world, demo_artifact):
    parts = (f"{demo_artifact}: the prompt has 402 tokens, this artifact takes 128 at most", "next: shorten it, or")
    is_refused(world, USAGE, (*parts, "frontend.shape.input_ids"), "run", demo_artifact, "-p", "list " * 400)


def test_parity_without_any_artifact(world):
    world.workspace.mkdir()
    parts = (f"{world.workspace}: no finished artifact", "next: name an artifact")
    is_refused(world, USAGE, parts, "parity", "--workspace", world.workspace)


# --- tokenizers and calibration data ---------------------------------------------------------------------------------


def test_calibration_needs_a_tokenizer(world):
    missing = f"{world.checkpoint / 'tokenizer.json'}: the tokenizer is missing"
    parts = (missing, "expected: the", "next: copy tokenizer.json")
    is_refused(world, FAILED, parts, *OPENERS["calibrate"](world))


def test_calibration_with_half_a_tokenizer(world):
    shutil.copytree("gemma_deploy/demo", world.root / "demo")
    make.tokenizer_is_cut(world.root / "demo")
    world.use(world.root / "demo")
    parts = (f"{world.checkpoint / 'tokenizer.json'}: is not a tokenizer", "next: copy it from where the weights")
    is_explained(world.run(*SMALL_CALIBRATION, world.workspace, "--checkpoint", world.checkpoint), FAILED, parts)
    assert not left(world)


SAMPLE = "or leave --path out to use the bundled sample"
C4, CEVAL, ALPACA = ("c4", "c4.json.gz"), ("ceval", "ceval.zip"), ("alpaca", "alpaca.json")
CALIBRATION = {
    "empty": (C4, make.bytes_of(b""), ("c4.json.gz: the file is empty", "expected: a c4 file", SAMPLE)),
    "no text": (C4, make.gzip_of(), ("c4.json.gz", "expected: ", "next: ")),
    "too short": (
        C4, make.gzip_of("A few words."),
        ("c4.json.gz: too short: 6 tokens", "8 windows of 64 tokens need 504", "expected: enough", "ask for less"),
    ),
    "gzip cut": (
        C4, make.cut_gzip, ("c4.json.gz: the gzip stream is cut short after line", "expected: a whole .json.gz", SAMPLE)
    ),
    "no gzip": (C4, make.bytes_of(b"PK plain"), ("c4.json.gz, line 1: is not JSON", "expected: gzipped lines", SAMPLE)),
    "wrong CSV header": (
        CEVAL, make.wrong_header,
        ("ceval.zip, val/physics_val.csv: the CSV header is", "'id,frage,A,B,C,D,answer'", "id,question,A", SAMPLE),
    ),
    "no zip": (CEVAL, make.bytes_of(b"nothing"), ("ceval.zip: is not a zip archive", "expected: a zip", SAMPLE)),
    "no JSON": (ALPACA, make.bytes_of(b"[{]"), ("alpaca.json: is not JSON", "line 1", "expected: a JSON list", SAMPLE)),
    "wrong keys": (
        ALPACA, make.bytes_of(b'[{"prompt": "x"}]'),
        ("alpaca.json, entry 0: has no 'instruction'", "its keys: prompt", "expected: a JSON list of", SAMPLE),
    ),
    "not there": (C4, lambda path: None, ("c4.json.gz: cannot be read: No such file", "expected: a c4 file", SAMPLE)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALIBRATION)
def test_bad_calibration_data(world, name):
    (dataset, file), how, parts = CALIBRATION[name]
    path = world.root / file
    how(path)
    arguments = ("--dataset", dataset, "--path", path, "--workspace", world.workspace, "--nsamples", 8, "--seqlen", 64)
    is_refused(world, FAILED, parts, "calibrate", *arguments)


def test_good_calibration_data_are_taken_by_the_same_command(world):
    """Or the refusals above would prove nothing."""
    path = world.root / "c4.json.gz"
    make.gzip_of("The list holds the names of all files. " * 40)(path)
    code, _, said = world.run(*SMALL_CALIBRATION, world.workspace, "--path", path)
    (folder,) = world.workspace.glob("calib/*")
    assert (code, "error:" in said) == (DONE, False)
    assert Calibration.open(folder).ranges
