"""Per-layer embeddings, experts and Gemma 3n in the library: proven, and the same bits in any company."""

import numpy as np
import pytest

from gemma_deploy.backends.native.graph import plan_in
from gemma_deploy.backends.native.library import Model
from gemma_deploy.compile import compile_recipe
from gemma_deploy.errors import ArtifactError
from gemma_deploy.names import PARAMS
from gemma_deploy.testing import TINY_EXPERTS, TINY_PER_LAYER
from tests.native.test_backend import MANY, SCHEMES, compare_in_company, in_pieces, opened, recipe_of

# Name -> model type and what is changed in the tiny config of that type.
MODELS = {
    "per-layer": ("gemma4_text", TINY_PER_LAYER),
    "experts": ("gemma4_text", TINY_EXPERTS),
    "3n": ("gemma3n_text", {}),
}
INT4_TABLE = {"per_layer_table": "int4"}


def compiled_in(folder, name, scheme, **options):
    kind, changes = MODELS[name]
    return compile_recipe(recipe_of(folder, kind, scheme, **options, **changes))


@pytest.fixture(scope="module")
def artifacts(native_library, tmp_path_factory):
    """Artifacts in int8, by name; each is made when it is first asked for."""
    made = {}

    def of(name):
        if name not in made:
            result = compiled_in(tmp_path_factory.mktemp(name), name, "w8a16")
            assert result.parity.passed
            made[name] = result.path
        return made[name]

    return of


@pytest.fixture(scope="module", params=sorted(MODELS))
def artifact(request, artifacts):
    return artifacts(request.param)


@pytest.fixture(scope="module")
def ids():
    return [int(one) for one in np.random.default_rng(0).integers(3, 500, 200)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        (name, scheme)
        for name in MODELS
        for scheme in SCHEMES
        if scheme != "w8a16"  # which the other tests compile
        and not (name == "3n" and scheme.startswith("w8a8"))  # refused
    ],
)
def test_it_compiles_proven(native_library, tmp_path, name, scheme):
    options = {"quantize": INT4_TABLE} if (name, scheme) == ("per-layer", "w4a16_rtn") else {}
    if name == "experts":  # of 7 layers two experts of a token are 4e-7 apart, and what is rounded turns them
        options["num_hidden_layers"] = 3
    assert compiled_in(tmp_path, name, scheme, **options).parity.passed


def test_a_token_gives_the_same_bits_whatever_its_company(artifact, ids):
    """Two pages of 128 positions and 25 windows: in one piece, in others, with 1 to 3 threads, among other texts."""
    compare_in_company(artifact, ids, ((1, [150, 1, 17, 30]), (3, [1, 2, 127, 5, 60])))


def test_logits_are_the_same_however_many_are_asked_for(artifact, ids):
    """Layers that share keys and values compute the tokens whose logits are wanted, and no others."""
    model = opened(artifact)
    expected = in_pieces(model, ids, iter([len(ids)]))
    for wanted in (0, 1, 3):
        sequence = model.sequence()
        found = model.logits([(sequence, ids[:160], wanted)])
        np.testing.assert_array_equal(found, expected[160 - wanted : 160])
        np.testing.assert_array_equal(model.logits([(sequence, ids[160:], 2)]), expected[-2:])
    model.close()


def changed(plan, word, **values):
    """A plan with other values in the first line that begins with a word; None: without that key."""
    lines = plan.split("\n")
    number = next(number for number, line in enumerate(lines) if line.startswith(f"{word} "))
    parts = dict(part.split("=", 1) for part in lines[number].split(" ")[1:])
    parts |= values
    lines[number] = " ".join([word, *(f"{key}={value}" for key, value in parts.items() if value is not None)])
    return "\n".join(lines)


def layer_name(plan, word, key):
    line = next(line for line in plan.split("\n") if line.startswith(f"{word} "))
    return dict(part.split("=", 1) for part in line.split(" ")[1:])[key]


WRONG = {
    "per-layer": {
        "another scale of the table": lambda plan: changed(plan, "vectors", table_factor=5),
        "another scale of the projection": lambda plan: changed(plan, "vectors", projection_factor=0.001),
        "another norm of what is added": lambda plan: changed(
            plan, "adds", norm=layer_name(plan, "layer", "input_norm")
        ),
        "gates of another layer": lambda plan: changed(plan, "adds", gate="model.layers.1.per_layer_input_gate.weight"),
        "no scalar": lambda plan: changed(plan, "layer", scalar=None),
    },
    "experts": {
        "one fewer": lambda plan: changed(plan, "experts", chosen=2),
        "an unscaled router": lambda plan: changed(plan, "experts", router_factor=1),
        "norms in the place of each other": lambda plan: changed(
            plan,
            "experts",
            norm=layer_name(plan, "experts", "post_norm"),
            post_norm=layer_name(plan, "experts", "norm"),
        ),
        "no norm of the dense MLP": lambda plan: changed(
            plan, "experts", dense_norm=layer_name(plan, "layer", "input_norm")
        ),
        "scales of another layer": lambda plan: changed(
            plan, "experts", scales="model.layers.1.router.per_expert_scale"
        ),
    },
    "3n": {
        "another stream is computed": lambda plan: changed(plan, "streams", active=1),
        "streams in another order": lambda plan: changed(
            plan, "streams", enter1=layer_name(plan, "streams", "enter2"), enter2=layer_name(plan, "streams", "enter1")
        ),
        "they leave in another order": lambda plan: changed(
            plan, "streams", leave1=layer_name(plan, "streams", "leave2"), leave2=layer_name(plan, "streams", "leave1")
        ),
        "an unscaled router": lambda plan: changed(plan, "altup", router_factor=1),
        "the prediction of another layer": lambda plan: changed(
            plan, "altup", prediction="model.layers.1.altup.prediction_coefs.weight"
        ),
        "the correction of another layer": lambda plan: changed(
            plan, "altup", correction="model.layers.1.altup.correction_coefs.weight"
        ),
        "the scale of another layer": lambda plan: changed(
            plan, "altup", scale="model.layers.1.altup.correct_output_scale"
        ),
        "no laurel": lambda plan: without(plan, "laurel"),
        "gates that are all there": lambda plan: changed(plan, "layer", quantile=None),
        "gates cut elsewhere": lambda plan: changed(plan, "layer", quantile=1.5),
    },
}
WRONGS = [(name, wrong) for name, all_of_it in WRONG.items() for wrong in all_of_it]


@pytest.mark.parametrize(("name", "wrong"), WRONGS)
def test_a_plan_that_is_wrong_gives_other_logits(artifacts, ids, name, wrong):
    path = artifacts(name)
    plan = plan_in(path)
    models = [
        Model(text, path / PARAMS, threads=1, cache_bytes=MANY, cache="float32", exact=True)
        for text in (plan, WRONG[name][wrong](plan))
    ]
    right, other = (in_pieces(model, ids[:40], iter([40])) for model in models)
    assert np.abs(right - other).max() > 1e-4 * np.abs(right).max()  # the gate's limit is 1e-5
    for model in models:
        model.close()


def without(plan, word):
    return "\n".join(line for line in plan.split("\n") if not line.startswith(f"{word} "))


def twice(plan, word):
    lines = plan.split("\n")
    number = next(number for number, line in enumerate(lines) if line.startswith(f"{word} "))
    return "\n".join([*lines[: number + 1], *lines[number:]])


DAMAGED = {
    "per-layer": {
        "layer 0 has no 'adds', and there are 'vectors'": lambda plan: without(plan, "adds"),
        "'adds' is there twice": lambda plan: twice(plan, "adds"),
        "or there are no 'vectors'": lambda plan: without(plan, "vectors"),
        "'vectors' come once": lambda plan: twice(plan, "vectors"),
        "has 224 columns, not 448": lambda plan: changed(plan, "vectors", size=64),
        "'size' is 24": lambda plan: changed(plan, "vectors", size=24),
        "no table 'x'": lambda plan: changed(plan, "vectors", table="x"),
        "'factor' is inf": lambda plan: changed(plan, "vectors", factor="inf"),
        "no 'norm'": lambda plan: changed(plan, "adds", norm=None),
        "x 64, not 64 x 32": lambda plan: changed(plan, "adds", projection=layer_name(plan, "adds", "gate")),
        "of a parameter file of": lambda plan: changed(plan, "table", rows=1 << 23),
        "'group' is 5, which does not divide": lambda plan: changed(plan, "table", group=5),
        "'group' is 0": lambda plan: changed(plan, "table", group=0),
        "'form' is int3": lambda plan: changed(plan, "table", form="int3"),
        "'columns' is 223": lambda plan: changed(plan, "table", columns=223),
        "'scales_at'": lambda plan: changed(plan, "table", scales_at=1 << 40),
    },
    "experts": {
        "'experts' is there twice": lambda plan: twice(plan, "experts"),
        "'chosen' is 9": lambda plan: changed(plan, "experts", chosen=9),
        "'chosen' is 0": lambda plan: changed(plan, "experts", chosen=0),
        "'count' is 0": lambda plan: changed(plan, "experts", count=0),
        "not 3072 x 64": lambda plan: changed(plan, "experts", count=16),
        "'width' is 8": lambda plan: changed(plan, "experts", width=8),
        "rows": lambda plan: changed(plan, "experts", count=1 << 16, width=1 << 16),
        "no 'scales'": lambda plan: changed(plan, "experts", scales=None),
        "no 'post_mlp_norm' of the layer": lambda plan: changed(plan, "layer", post_mlp_norm=None),
        "no vector 'x'": lambda plan: changed(plan, "experts", router_scale="x"),
    },
    "3n": {
        "layer 0 has no 'altup', and there are 'streams'": lambda plan: without(plan, "altup"),
        "or there are no 'streams'": lambda plan: without(plan, "streams"),
        "'streams' come once": lambda plan: twice(plan, "streams"),
        "'streams' come behind 'vectors'": lambda plan: without(plan, "vectors"),
        "'altup' is there twice": lambda plan: twice(plan, "altup"),
        "'laurel' is there twice": lambda plan: twice(plan, "laurel"),
        "'count' is 9, not a whole number from 2 to 8": lambda plan: changed(plan, "streams", count=9),
        "'active' is 4": lambda plan: changed(plan, "streams", active=4),
        "no 'enter4'": lambda plan: changed(plan, "streams", count=5),
        "not 64 x 64": lambda plan: changed(plan, "streams", leave1="model.per_layer_model_projection.weight"),
        "'router' is no matrix of float32": lambda plan: changed(
            plan, "altup", router=layer_name(plan, "laurel", "left")
        ),
        "'quantile' is nan": lambda plan: changed(plan, "layer", quantile="nan"),
        "'rank' is 0": lambda plan: changed(plan, "laurel", rank=0),
        "is 16 x 64, not 64 x 64": lambda plan: changed(plan, "laurel", rank=64),
    },
}
DAMAGES = [(name, words) for name, all_of_it in DAMAGED.items() for words in all_of_it]


@pytest.mark.parametrize(("name", "words"), DAMAGES)
def test_a_damaged_plan_is_told(artifacts, name, words):
    path = artifacts(name)
    with pytest.raises(ArtifactError, match=words):
        Model(DAMAGED[name][words](plan_in(path)), path / PARAMS, cache_bytes=MANY)
