"""LoRA adapters beside native artifacts: PEFT's own numbers, the same bits in any company, damaged ones refused."""

import json

import numpy as np
import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.native import adapters
from gemma_deploy.backends.native.adapters import keep, packed, read_kept
from gemma_deploy.backends.native.graph import plan_in
from gemma_deploy.cli import main
from gemma_deploy.compile import compile_recipe
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import ArtifactError, DeployError, NotBuiltError, UsageError
from gemma_deploy.parity.cases import Case
from gemma_deploy.recipe import Recipe
from gemma_deploy.verifying import verify
from tests.backends.make import off
from tests.backends.peft_make import adapted
from tests.native.test_backend import opened, recipe_of

RANK = 40
ADAPTERS = {
    "pirate": {"seed": 1, "rank": 4, "alpha": 12},
    "poet": {
        "seed": 2,
        "rank": 39,
        "alpha": 7,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    },
}
CLOSE = 1e-5  # float32 beside float64: 3.7e-6 was the most
PROMPT = [2, *np.random.default_rng(5).integers(3, 500, 180).tolist()]  # 22 windows of 8, and more than a page


def eager_model(checkpoint):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()


def compiled(folder, kind, scheme):
    """An artifact that takes adapters, and directories of two."""
    recipe_of(folder, kind, scheme)
    file = folder / "recipe.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"adapters": {"rank": RANK}}))
    path = compile_recipe(Recipe.load(file), parity=False).path
    for name, settings in ADAPTERS.items():
        adapted(eager_model(folder / "ck"), **settings).save_pretrained(folder / name)
    return path


@pytest.fixture(scope="module")
def root(native_library, tmp_path_factory):
    """A folder with an artifact in float32 (w/x) and two adapters that PEFT wrote."""
    folder = tmp_path_factory.mktemp("adapters")
    compiled(folder, "gemma3_text", "fp32")
    return folder


@pytest.fixture(scope="module")
def made(root):
    """Name of an adapter -> what the library takes."""
    artifact = Artifact.open(root / "w" / "x")
    slots = artifact.manifest.contract.adapters
    kept = {name: read_kept(keep(artifact, root / name), slots) for name in ADAPTERS}
    return {name: packed(matrices, plan_in(artifact.path)) for name, matrices in kept.items()}


@pytest.fixture(scope="module")
def expected(root):
    """Name of an adapter or None -> PEFT's logits of the prompt, nothing merged, in float64."""
    import torch
    from peft import PeftModel

    found = {}
    for name in (*ADAPTERS, None):
        model = eager_model(root / "ck")
        model = (model if name is None else PeftModel.from_pretrained(model, root / name).eval()).double()
        with torch.inference_mode():
            found[name] = np.asarray(model(torch.tensor([PROMPT])).logits[0])
    return found


def test_a_step_of_two_adapters_and_none_gives_pefts_numbers(root, made, expected):
    """In pieces of other lengths each, so that rows of all three stand beside each other."""
    model = opened(root / "w" / "x", cache="float32", exact=True)
    numbers = {name: model.load_adapter(*one) for name, one in made.items()} | {None: 0}
    sequences = {name: model.sequence(adapter=number) for name, number in numbers.items()}
    found, cuts = {name: [] for name in numbers}, {"pirate": [100, 1, 80], "poet": [7, 170, 4], None: [150, 30, 1]}
    ends = {name: np.cumsum([0, *sizes]) for name, sizes in cuts.items()}
    for step in range(3):
        pieces = [(sequences[name], PROMPT[slice(*ends[name][step : step + 2])], cuts[name][step]) for name in numbers]
        rows = model.logits(pieces)
        for name in numbers:
            found[name].append(rows[: cuts[name][step]])
            rows = rows[cuts[name][step] :]
    model.close()
    for name in numbers:
        assert off(np.concatenate(found[name]), expected[name]) < CLOSE
    assert off(expected["pirate"], expected[None]) > 0.1
    assert off(expected["poet"], expected["pirate"]) > 0.1


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_a_token_gives_the_same_bits_whatever_adapters_stand_beside_it(root, made, form):
    artifact = root / "w" / "x"
    kept = {name: read_kept(keep(Artifact.open(artifact), root / name), slots_of(artifact)) for name in ADAPTERS}
    made = {name: packed(matrices, plan_in(artifact), form) for name, matrices in kept.items()}
    names = ("pirate", "poet", None, "pirate")
    alone = {}
    for name in set(names):
        model = opened(artifact, threads=1)
        number = 0 if name is None else model.load_adapter(*made[name])
        one = model.sequence(adapter=number)
        alone[name] = np.concatenate([model.logits([(one, [token], 1)]) for token in PROMPT])
        model.close()
    assert len({rows[-1].tobytes() for rows in alone.values()}) == 3
    for threads in (1, 3):
        model = opened(artifact, threads=threads)
        numbers = {name: model.load_adapter(*one) for name, one in made.items()} | {None: 0}
        sequences = [model.sequence(adapter=numbers[name]) for name in names]
        for begin, end in ((0, 90), (90, 92), (92, 93), (93, 181)):
            rows = model.logits([(one, PROMPT[begin:end], end - begin) for one in sequences])
            for name, some in zip(names, np.split(rows, len(names)), strict=True):
                np.testing.assert_array_equal(some, alone[name][begin:end])
        model.close()


def slots_of(artifact):
    return Artifact.open(artifact).manifest.contract.adapters


def test_a_fork_goes_on_with_its_adapter_and_text_keeps_the_one_it_began_with(root, made):
    model = opened(root / "w" / "x")
    number = model.load_adapter(*made["pirate"])
    first, plain = model.sequence(adapter=number), model.sequence()
    model.logits([(first, PROMPT[:20], 1)])
    model.logits([(plain, PROMPT[:20], 1)])
    with pytest.raises(DeployError, match="has 20 tokens, which were computed with another adapter or with none"):
        model._check(model._library.gemma_sequence_adapt(model._handle, plain, number))
    with pytest.raises(DeployError, match="has 20 tokens"):
        model.sequence(first, adapter=number)
    with pytest.raises(DeployError, match="no adapter 99"):
        model.sequence(adapter=99)
    fork = model.sequence(first)
    model.drop_adapter(number)  # who goes on with it keeps it
    with pytest.raises(DeployError, match=f"no adapter {number}"):
        model.drop_adapter(number)
    rows = model.logits([(first, PROMPT[20:23], 3), (plain, PROMPT[20:23], 3), (fork, PROMPT[20:23], 3)])
    np.testing.assert_array_equal(rows[:3], rows[6:])
    assert not np.allclose(rows[:3], rows[3:6])
    model.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text, data: (text.replace("rank=16", "rank=4096", 1), data), "bytes .* to .* of"),
        (lambda text, data: (text, data[:-64]), "bytes .* to .* of"),
        (lambda text, data: (text.replace("down=0", "down=32", 1), data), "'down' is no multiple of 64"),
        (lambda text, data: (text.replace("down=0", "down=-64", 1), data), "not a whole number"),
        (lambda text, data: (text.replace("down=0", "down=99999999999999999999", 1), data), "not a whole number"),
        (lambda text, data: (text.replace("rank=16", "rank=8", 1), data), "not a whole number from 16"),
        (lambda text, data: (text.replace("rank=16", "rank=17", 1), data), "no multiple of 16"),
        (lambda text, data: (text.replace("layer=0", "layer=77", 1), data), "not a whole number from 0 to"),
        (lambda text, data: (text.replace("linear=q", "linear=w", 1), data), "'linear' is w"),
        (lambda text, data: (text.replace("float32", "int8", 1), data), "'form' is int8"),
        (lambda text, data: (text + "\n" + text.splitlines()[0], data), "is there twice"),
        (lambda text, data: (text + " more=1", data), "'more' is not known"),
        (lambda text, data: ("matrix" + text, data), "'matrixadapts' is not known"),
    ],
)
def test_damaged_adapters_are_refused(root, made, change, words):
    model = opened(root / "w" / "x", threads=1)
    with pytest.raises(DeployError, match=words):
        model.load_adapter(*change(*made["pirate"]))
    model.close()


def test_sessions_change_adapters_and_read_their_text_again(root, made, expected):
    """Greedy replies of one session, with one adapter and the other and none, are those of new sessions."""
    engine = open_engine(root / "w" / "x", threads=1)
    names = [engine.load_adapter(root / name) for name in ADAPTERS]
    assert names == list(ADAPTERS)
    session, text = engine.session(endless=True), list(PROMPT[:40])
    session.reply(text, max_new_tokens=1)
    session.read(text)
    for name in ("pirate", None, "poet"):
        session.use(name)
        assert session.adapter == name
        assert session.ids == text
        other = engine.session(endless=True)
        other.use(name)
        more = PROMPT[len(text) : len(text) + 20]
        found = session.read(more)
        text += more
        np.testing.assert_array_equal(found, other.read(text))
        assert off(found, expected[name][len(text) - 1]) < 0.02  # caches of bfloat16: 0.004 was the most
    with pytest.raises(UsageError, match="no adapter 'nobody' is loaded"):
        session.use("nobody")


def test_run_parity_and_verify_know_adapters(root, tmp_path, capsys):
    artifact = root / "w" / "x"
    words = ["run", str(artifact), "-p", "the list the list", "-n", "12"]
    said = {}
    for name in (None, *ADAPTERS):
        assert main([*words, *(() if name is None else ("--adapter", str(root / name)))]) == 0
        said[name] = capsys.readouterr().out
    assert said["poet"] != said[None]  # the other one ends at once, as none does
    assert main([*words, "--adapter", str(root / "poet"), "--draft", str(artifact)]) == 0
    assert capsys.readouterr().out == said["poet"]
    assert verify(artifact)
    assert main(["parity", str(artifact), "--adapter", str(root / "pirate")]) == 0
    assert "peft = strict" in capsys.readouterr().out
    kept = next((artifact / "adapters").glob("pirate-*")) / "adapter.safetensors"
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(ArtifactError, match="has changed since it was made"):
        open_engine(artifact).load_adapter(kept.parent.name)
    kept.write_bytes(whole)


def test_what_cannot_be_computed_beside_is_refused(root, tmp_path):
    engine = open_engine(root / "w" / "x", threads=1)
    for name, settings, kind, words in (
        ("large", {"rank": RANK + 1}, UsageError, "takes adapters of rank 40 at most"),
        ("dora", {"use_dora": True}, NotBuiltError, "cannot be loaded beside an artifact"),
    ):
        adapted(eager_model(root / "ck"), seed=3, **settings).save_pretrained(tmp_path / name)
        with pytest.raises(kind, match=words):
            engine.load_adapter(tmp_path / name)


def test_beside_codes_sessions_servers_and_the_proof_of_what_is_shipped_read_bfloat16(native_library, tmp_path):
    """All three with the same bits; the exact proof has what the file holds."""
    engine = open_engine(compiled(tmp_path, "gemma3_text", "w8a16"), threads=1)
    name = engine.load_adapter(tmp_path / "pirate")
    session, model = engine.session(endless=True), engine.many(1 << 26)
    session.use(name)
    text, panels = engine.packed_adapter(tmp_path / "pirate")
    assert "form=float32" not in text
    sequence = model.sequence(adapter=model.load_adapter(text, panels))
    found = session.read(PROMPT[:60])
    np.testing.assert_array_equal(found, model.head(model.normed([(sequence, PROMPT[:60], 1)]))[0])
    case = Case("text", (tuple(PROMPT[:60]),), ((),))
    rows = {kernels: engine.source(kernels, name) for kernels in ("shipped", "strict")}
    last = {kernels: source.head(source.run([case])[0][0])[-1] for kernels, source in rows.items()}
    np.testing.assert_array_equal(found, last["shipped"])
    matrices = adapters.matrices_of(engine.artifact, tmp_path / "pirate")
    exact = opened(engine.path, cache="float32", exact=True)
    whole = exact.load_adapter(*packed(matrices, plan_in(engine.path)))
    expected = exact.logits([(exact.sequence(adapter=whole), PROMPT[:60], 1)])[0]
    np.testing.assert_array_equal(last["strict"], expected)
    assert 0 < off(found, expected) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("gemma2", "bf16"), ("gemma3_text", "w8a16_gptq"), ("gemma4_text", "w4a16_rtn+kv8"), ("gemma3_text", "w8a16")],
)
def test_the_gate_passes_with_an_adapter(native_library, tmp_path, kind, scheme, capsys):
    path = compiled(tmp_path, kind, scheme)
    for name in ADAPTERS:
        assert main(["parity", str(path), "--adapter", str(tmp_path / name)]) == 0, capsys.readouterr()


@pytest.mark.slow
def test_the_gate_fails_with_a_wrong_scaling(native_library, tmp_path, monkeypatch, capsys):
    path, right = compiled(tmp_path, "gemma3_text", "w8a16"), adapters.packed
    from gemma_deploy.backends.native import source

    monkeypatch.setattr(source, "packed", lambda matrices, plan, form: right(wrong(matrices), plan, form))
    assert main(["parity", str(path), "--adapter", str(tmp_path / "pirate")]) == 1


def wrong(matrices):
    name = next(one for one in matrices if one.endswith("layers.2.mlp.up_proj.lora_B"))
    return dict(matrices) | {name: matrices[name] * 2}
