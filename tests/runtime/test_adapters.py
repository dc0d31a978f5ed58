"""Adapters beside an artifact: PEFT's tokens and logits in both runtimes, changed while the model stays open."""

import io
import json
import shutil

import numpy as np
import pytest

from gemma_deploy.artifact.adapters import RECORD, kept_names, open_kept
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.backends.onnxruntime import adapters
from gemma_deploy.backends.onnxruntime.engine import OrtEngine
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.cli import main
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import ArtifactError, NotBuiltError, UsageError
from gemma_deploy.parity.cases import Case
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.verifying import verify
from tests.backends.make import expected_logits, off
from tests.backends.peft_make import adapted
from tests.runtime.make import compile_tiny

RUNTIMES = ("onnxruntime-genai", "onnxruntime")
RANK, COUNT = 8, 12
PROMPT = [2, *np.random.default_rng(5).integers(3, 500, 24).tolist()]  # three windows of 8
MORE = PROMPT[3:9]
CLOSE = 1e-5  # float32 sums in another order: 1.3e-6 was the most
FOLDED = 1e-4  # the same where factors were divided out of weights in float32: 1.5e-5 was the most
ADAPTERS = {
    "pirate": {"seed": 1, "rank": 4, "alpha": 12},
    "poet": {"seed": 2, "rank": 7, "alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
}


@pytest.fixture(scope="session")
def root(once):
    """A tiny Gemma 3 compiled with `adapters`, and two adapters of its checkpoint that PEFT wrote; read only."""

    def make(root):
        compile_tiny(root, "gemma3_text", {"type": "onnxruntime", "dtype": "fp32"}, recipe={"adapters": {"rank": RANK}})
        for name, settings in ADAPTERS.items():
            adapted(eager_model(root / "checkpoint"), **settings).save_pretrained(root / name)

    return once("adapters-gemma3_text", make)


def eager_model(checkpoint):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reference(root):
    """PEFT's model, unmerged: name of an adapter or None -> (function of ids to logits [tokens, V], to greedy ids)."""
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(eager_model(root / "checkpoint"), root / "pirate", adapter_name="pirate")
    model.load_adapter(root / "poet", "poet")
    model.eval()

    def of(name):
        def logits(ids):
            with torch.inference_mode():
                return np.asarray(model(torch.tensor([ids])).logits[0])

        def greedy(ids, count=COUNT):
            with torch.inference_mode():
                made = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=count, do_sample=False)
            return made[0, len(ids) :].tolist()

        def call(function, *args):
            if name is None:
                with model.disable_adapter():
                    return function(*args)
            model.set_adapter(name)
            return function(*args)

        return lambda ids: call(logits, ids), lambda *args: call(greedy, *args)

    return of


@pytest.fixture
def copy(root, tmp_path):
    return shutil.copytree(root / "workspace" / "tiny", tmp_path / "artifact")


def opened(directory, runtime):
    engine = OrtEngine(Artifact.open(directory)) if runtime == "onnxruntime" else open_engine(directory, threads=1)
    assert engine.runtime == runtime
    return engine


def said(session, ids, count=COUNT):
    stats = GenerationStats()
    for _ in session.reply(ids, max_new_tokens=count, stats=stats):
        pass
    return stats.tokens


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_peft_numbers_and_tokens_from_one_adapter_to_the_other_and_back_to_none(root, copy, reference, runtime):
    engine = opened(copy, runtime)
    names = [engine.load_adapter(root / name) for name in ADAPTERS]
    assert names == list(ADAPTERS)
    session = engine.session()
    spoken = []
    for name in ("pirate", "poet", None, "pirate"):
        logits, greedy = reference(name)
        session.reset()
        session.use(name)
        assert session.adapter == name
        assert off(session.read(PROMPT), logits(PROMPT)[-1]) < CLOSE
        session.reset()
        tokens = said(session, PROMPT)
        assert tokens == greedy(PROMPT)
        spoken.append(tuple(tokens))
        assert said(session, MORE) == greedy([*PROMPT, *tokens, *MORE])
    assert len(set(spoken)) == 3
    assert spoken[0] == spoken[3]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_sequence_goes_on_with_another_adapter_as_if_it_had_read_all_of_it(root, copy, reference, runtime):
    engine = opened(copy, runtime)
    for name in ADAPTERS:
        engine.load_adapter(root / name)
    session = engine.session()
    session.use("pirate")
    sequence = [*PROMPT, *said(session, PROMPT)]
    for name in ("poet", None):
        session.use(name)
        assert session.ids == sequence
        sequence += MORE
        tokens = said(session, MORE)
        assert tokens == reference(name)[1](sequence)
        sequence += tokens


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_sessions_with_different_adapters_do_not_disturb_each_other(root, copy, reference, runtime):
    engine = opened(copy, runtime)
    sessions = {}
    for name in (*ADAPTERS, None):
        sessions[name] = engine.session()
        sessions[name].use(None if name is None else engine.load_adapter(root / name))
    found = {name: [] for name in sessions}
    replies = {name: (GenerationStats(), session) for name, session in sessions.items()}
    running = {
        name: session.reply(PROMPT, max_new_tokens=COUNT, stats=stats) for name, (stats, session) in replies.items()
    }
    while running:
        for name in list(running):
            if next(running[name], None) is None:
                found[name] = replies.pop(name)[0].tokens
                del running[name]
    assert found == {name: reference(name)[1](PROMPT) for name in sessions}


def test_lookup_decodes_with_the_adapter(root, copy, reference):
    engine = open_engine(copy, threads=1)
    engine.load_adapter(root / "pirate")
    stats = GenerationStats()
    list(engine.stream(PROMPT, max_new_tokens=COUNT, lookup=True, adapter="pirate", stats=stats))
    assert stats.tokens == reference("pirate")[1](PROMPT)


def test_an_adapter_is_kept_once_by_name_and_verified(root, copy, capsys):
    assert main(["adapter", str(copy), str(root / "pirate"), "--name", "arr"]) == 0
    assert "rank 4, 49 linears" in capsys.readouterr().out
    kept = open_kept(Artifact.open(copy), "arr")
    before = kept.file.stat().st_mtime_ns
    assert main(["adapter", str(copy), str(root / "pirate"), "--name", "arr"]) == 0
    assert kept.file.stat().st_mtime_ns == before
    assert main(["adapter", str(copy), str(root / "poet"), "--name", "arr"]) == 2
    assert "another adapter of that name, made from pirate" in capsys.readouterr().err
    assert main(["adapter", str(copy), str(root / "poet"), "--name", "arr", "--force"]) == 0
    assert open_kept(Artifact.open(copy), "arr").record.source == "poet"
    assert any("1 adapters" in line for line in verify(copy))
    assert kept_names(Artifact.open(copy)) == ["arr"]


def test_run_and_chat_speak_with_it(root, copy, capsys, monkeypatch):
    def ran(*options):
        assert main(["run", str(copy), "-p", "the list", "-n", "8", *options]) == 0
        return capsys.readouterr().out

    plain, pirate = ran(), ran("--adapter", str(root / "pirate"))
    assert plain != pirate
    assert kept_names(Artifact.open(copy))[0].startswith("pirate-")
    assert ran("--adapter", kept_names(Artifact.open(copy))[0]) == pirate
    assert main(["run", str(copy), "-p", "x", "--adapter", "nobody"]) == 2
    message = capsys.readouterr().err
    assert "there is no adapter 'nobody'" in message
    assert "kept here: pirate-" in message


def damaged(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def test_a_file_that_changed_is_refused_before_it_is_used(root, copy):
    engine = open_engine(copy, threads=1)
    name = engine.load_adapter(root / "poet")
    kept = open_kept(Artifact.open(copy), kept_names(Artifact.open(copy))[0])
    damaged(kept.file)
    with pytest.raises(ArtifactError, match="sha256"):
        engine.session().use(name)
    with pytest.raises(ArtifactError, match="sha256"):
        open_engine(copy).load_adapter(kept.name)
    with pytest.raises(ArtifactError, match="sha256"):
        verify(copy)
    assert open_engine(copy).load_adapter(root / "poet") == "poet"  # made again


def test_an_adapter_of_another_artifact_is_refused(root, copy):
    open_engine(copy).load_adapter(root / "poet")
    (name,) = kept_names(Artifact.open(copy))
    record = copy / "adapters" / name / RECORD
    values = json.loads(record.read_text())
    record.write_text(json.dumps(values | {"artifact": "0" * 64}))
    with pytest.raises(ArtifactError, match="made for another artifact"):
        open_engine(copy).load_adapter(name)
    record.write_text("{}")
    with pytest.raises(ArtifactError, match="is damaged"):
        open_engine(copy).load_adapter(name)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 9}, "adapters of rank 8 at most"),
        ({"use_dora": True}, "a magnitude for each row (DoRA)"),
        ({"modules_to_save": ["embed_tokens"]}, "trained as a whole (modules_to_save)"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "LoRA of a module that is no linear of a layer"),
        ({"trainable_token_indices": [5, 6]}, "rows are trained (trainable_token_indices)"),
    ],
)
def test_what_can_only_be_merged_is_refused(root, copy, tmp_path, settings, sentence):
    adapted(eager_model(root / "checkpoint"), 3, **settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises((UsageError, NotBuiltError)) as caught:
        open_engine(copy).load_adapter(tmp_path / "adapter")
    assert sentence in str(caught.value)
    assert "frontend.adapter" in str(caught.value)
    assert kept_names(Artifact.open(copy)) == []


def test_an_artifact_without_the_section_says_what_to_do(root, genai_artifact):
    with pytest.raises(UsageError, match="takes no adapter at run time") as caught:
        open_engine(genai_artifact("gemma3_text")).load_adapter(root / "poet")
    assert "adapters: {rank: N}" in str(caught.value)
    with pytest.raises(UsageError, match="no adapter 'poet' is loaded"):
        open_engine(genai_artifact("gemma3_text")).session().use("poet")


def test_chat_changes_who_speaks(root, copy, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the list\n/adapter poet\nthe list\n/adapter none\n/adapter\n"))
    adapters = ["--adapter", str(root / "pirate"), "--adapter", str(root / "poet")]
    assert main(["chat", str(copy), "--threads", "1", "-n", "6", *adapters]) == 0
    out, err = capfd.readouterr()
    first, second = out.splitlines()[:2]
    assert first != second
    assert "adapters: pirate, poet (speaks)" in err
    assert err.count("adapters: pirate, poet; the model alone speaks") == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("/adapter nobody\n"))
    assert main(["chat", str(copy)]) == 2
    assert "there is no adapter 'nobody'" in capfd.readouterr().err


def test_inspect_shows_what_it_takes_and_keeps(root, copy, capsys):
    assert main(["adapter", str(copy), str(root / "poet"), "--name", "poet"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(copy), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapters"] == {"takes": "of rank 8 at most, float32, on 49 linears", "keeps": 1}
    (row,) = found["kept adapters"]
    assert (row["adapter"], row["rank"], row["linears"], row["from"]) == ("poet", 7, 21, "poet")


def unfolded(artifact, model):
    """A model of transformers with the linears and the table of an artifact, the factors of calibration taken out."""
    import torch
    from safetensors.numpy import load_file

    opened = Artifact.open(artifact)
    config = Checkpoint.open(artifact.parent.parent / "checkpoint").config
    weights, stored = ArtifactWeights(config, artifact, opened.manifest), load_file(artifact / "params.safetensors")
    found = {}
    for name, info in weights.tensors.items():
        if len(info.shape) == 2:
            found[name] = weights.rows(name, 0, info.shape[0]).copy()
    for layer in config.layers:
        heads, kv_heads, size = layer.heads, layer.kv_heads, layer.head_dim
        for group in layer.groups:
            factors = stored[f"{layer.prefix}{group.observed}.column_factor"]
            for reader in group.readers:
                found[f"{layer.prefix}{reader}.weight"] /= factors
            if group.maker == "self_attn.v_proj":  # heads that read one value head share its factors
                factors = factors.reshape(kv_heads, heads // kv_heads, size)
                assert (factors == factors[:, :1]).all()
                found[f"{layer.prefix}{group.maker}.weight"] *= factors[:, 0].reshape(-1, 1)
            elif group.maker:
                found[f"{layer.prefix}{group.maker}.weight"] *= factors[:, None]
    state = model.state_dict()
    for name, weight in found.items():
        was = state[name].numpy()
        assert np.linalg.norm(weight - was) < 0.5 * np.linalg.norm(was), name
        state[name].copy_(torch.from_numpy(weight))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16_gptq"])
def test_factors_of_calibration_are_folded_into_the_adapter(tmp_path, monkeypatch, kind, scheme):
    """Columns and rows of calibrated weights are multiplied by factors, and so are those of what is added to them."""
    recipe = {"adapters": {"rank": 4}, "dataset": {"nsamples": 16, "seqlen": 32},
              "frontend": {"quantize": {"type": scheme}}}  # fmt: skip
    artifact = compile_tiny(tmp_path, kind, {"type": "onnxruntime", "dtype": "int8"}, recipe=recipe)
    model = adapted(unfolded(artifact, eager_model(tmp_path / "checkpoint")), 1)
    expected = expected_logits(model, PROMPT)
    model.save_pretrained(tmp_path / "adapter")

    def lost():
        source = engine.source("strict", engine.load_adapter(tmp_path / "adapter"))
        return off(source.head(source.run([Case("text", (tuple(PROMPT),), ((),))])[0][0]), expected)

    engine = open_engine(artifact)
    right = lost()
    monkeypatch.setattr(adapters, "folded", lambda matrices, artifact: matrices)
    shutil.rmtree(artifact / "adapters")
    wrong = lost()
    assert right < FOLDED
    assert wrong > 0.1
