"""model.onnx of `backend.type: native` in an unmodified ONNX Runtime, with the library as its custom operators."""

import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.native.graph import GRAPH, plan_in
from gemma_deploy.backends.native.library import Model, library_path
from gemma_deploy.compile import compile_recipe
from gemma_deploy.engine import open_engine
from gemma_deploy.names import PARAMS
from gemma_deploy.testing import TINY_EXPERTS, TINY_PER_LAYER
from tests.native.test_backend import MANY, recipe_of

BFLOAT16 = int(onnx.TensorProto.BFLOAT16)
NAN = 0x7FC0
ROOMS = (384, 333, 90)  # whole pages of 128 positions; an odd rest behind them; none
# The second: two geometries, two KV heads; then layers without caches, experts, streams.
MODELS = {
    "gemma3_text": ("gemma3_text", {}),
    "gemma4_text": ("gemma4_text", {}),
    "per-layer": ("gemma4_text", TINY_PER_LAYER),
    "experts": ("gemma4_text", TINY_EXPERTS),
    "3n": ("gemma3n_text", {}),
}
SLOW = ("per-layer", "experts", "3n")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]
)
def artifact(request, native_library, tmp_path_factory):
    """An artifact of a tiny model in int8."""
    kind, changes = MODELS[request.param]
    return compile_recipe(recipe_of(tmp_path_factory.mktemp(request.param), kind, "w8a16", **changes)).path


def session_of(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # what is refused is raised as well
    options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def session(artifact):
    return session_of(artifact / GRAPH)


def whole(*shape, fill=1):
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.full(shape, fill, np.int64))


def cache(*shape, fill=0):
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(np.full(shape, fill, np.uint16), BFLOAT16)


def caches(session, room, fill=0):
    """Past keys and values of every layer, by name."""
    ports = [port for port in session.get_inputs() if port.name.startswith("past_key_values")]
    return {port.name: cache(1, port.shape[1], room, port.shape[3], fill=fill) for port in ports}


def step(session, past, ids, length, *, in_place):
    """Logits behind `ids`, the last of `length` tokens, and the caches behind them."""
    feeds = {
        "input_ids": onnxruntime.OrtValue.ortvalue_from_numpy(np.array([ids], np.int64)),
        "attention_mask": whole(1, length),
    } | past
    names = ["logits", *(name.replace("past_key_values", "present") for name in past)]
    if not in_place:
        logits, *present = session.run_with_ort_values(names, feeds)
        return logits.numpy()[0, -1], dict(zip(past, present, strict=True))
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in zip(names[1:], past.values(), strict=True):
        binding.bind_ortvalue_output(name, value)
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    return binding.get_outputs()[-1].numpy()[0, -1], past


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("room", ROOMS)
def test_it_gives_the_bits_of_the_c_abi(artifact, session, room, in_place):
    """Past the windows, in pieces, and back to an earlier length; what nobody has written may be no number."""
    model = Model(plan_in(artifact), artifact / PARAMS, threads=2, cache_bytes=MANY)
    ids = np.random.default_rng(1).integers(3, 500, room)
    sequence, past, at = model.sequence(), caches(session, room, NAN), 0
    for size in (50, 1, 1, 38, 100, 70, 1, 1, 71, 51):
        if at == room:
            break
        piece = ids[at : at + size]
        at += len(piece)
        logits, past = step(session, past, piece, at, in_place=in_place)
        np.testing.assert_array_equal(logits, model.logits([(sequence, piece, 1)])[0])
    other = [*ids[: room // 2], *ids[:9]]
    again = model.logits([(model.sequence(), other, 1)])[0]
    logits, _ = step(session, past, ids[:9], len(other), in_place=in_place)
    np.testing.assert_array_equal(logits, again)
    model.close()


def test_what_is_wrong_is_a_sentence(session):
    past = caches(session, 64)
    name = list(past)[1]
    _, heads, _, size = past[name].shape()
    good = {"input_ids": whole(1, 5), "attention_mask": whole(1, 5)} | past
    for changed, sentence in (
        ({"input_ids": whole(2, 5)}, r"'input_ids' is \[2, 5\], not \[1, tokens\]"),
        ({"input_ids": whole(1, 0)}, r"'input_ids' is \[1, 0\]"),
        ({"input_ids": whole(1, 5, fill=-1)}, r"token -1 at 0 is not in the table"),
        ({"input_ids": whole(1, 5, fill=1 << 40)}, r"token 1099511627776 at 0"),
        ({"attention_mask": whole(1, 4)}, r"'attention_mask' is \[1, 4\], not \[1, positions\] with at least 5"),
        ({"attention_mask": whole(1, 5, fill=0)}, r"padding is not known here"),
        ({"attention_mask": whole(1, 65)}, r"'past key 0' has room for 64 positions, not for 65"),
        ({"attention_mask": whole(1, 4000)}, r"4000 positions, more than the context"),
        ({name: cache(1, heads, 128, size)}, r"keys and values of cache 0 differ in their room"),
    ):
        with pytest.raises(Exception, match=sentence):
            session.run_with_ort_values(None, good | changed)
    assert np.isfinite(session.run_with_ort_values(["logits"], good)[0].numpy()).all()


def test_a_damaged_model_does_not_open(artifact, monkeypatch):
    model = onnx.load(artifact / GRAPH, load_external_data=False)
    path = artifact / "damaged.onnx"

    def opening(change):
        damaged = onnx.ModelProto()
        damaged.CopyFrom(model)
        change(damaged.graph)
        onnx.save(damaged, path)
        return session_of(path)

    def plan(text):
        return lambda graph: setattr(graph.node[0].attribute[0], "s", text)

    def shorter(graph):
        graph.initializer[0].dims[0] = 1024
        next(entry for entry in graph.initializer[0].external_data if entry.key == "length").value = "1024"

    def fewer(graph):
        for names in (graph.node[0].input, graph.node[0].output, graph.input, graph.output):
            del names[-2:]

    text = model.graph.node[0].attribute[0].s
    for change, sentence in (
        (plan(b""), "plan: it is empty"),
        (plan(text.replace(b"version=1", b"version=2", 1)), "plan, line 1: 'version' is 2"),
        (shorter, "of a parameter file of 1024"),
        (fewer, "outputs, the plan needs"),
    ):
        with pytest.raises(Exception, match=sentence):
            opening(change)
    monkeypatch.setenv("GEMMA_DEPLOY_KERNELS", "none such")
    with pytest.raises(Exception, match="this processor has no level 'none such'"):
        opening(lambda graph: None)


OFTEN = """
import sys
import numpy as np, onnxruntime
for _ in range(20):
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(sys.argv[2])
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    del session, options
    assert sys.argv[2] not in open("/proc/self/maps").read()
"""


def test_sessions_close_and_the_library_goes(artifact):
    """No thread is left in it: the process would die."""
    subprocess.run([sys.executable, "-c", OFTEN, str(artifact / GRAPH), str(library_path())], check=True, timeout=120)


def test_onnxruntime_genai_runs_the_artifact_as_it_is(artifact, monkeypatch, tmp_path):
    """From another directory, in an artifact that was moved, twice: the tokens of our own engine."""
    genai = pytest.importorskip("onnxruntime_genai")
    moved = tmp_path / "moved"
    shutil.copytree(artifact, moved)
    monkeypatch.chdir(tmp_path)
    engine = open_engine(Artifact.open(artifact))
    prompt = [2, *(int(one) for one in np.random.default_rng(4).integers(3, 500, 140))]
    session, said = engine.session(endless=True), []
    for row in range(30):
        said.append(int(session.read(prompt if row == 0 else said[-1:]).argmax()))
    for _ in range(2):
        model = genai.Model(str(moved))
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + 30, min_length=len(prompt) + 30, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert list(generator.get_sequence(0))[len(prompt) :] == said
        del generator, parameters, model
