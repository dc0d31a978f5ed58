"""Activations of 8 bits (w8a8) and weights of float16 in the library: plans, whole models, ONNX Runtime."""

import numpy as np
import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.native.graph import GRAPH, plan_in
from gemma_deploy.backends.native.library import Model
from gemma_deploy.backends.native.plan import INPUT_GROUP
from gemma_deploy.compile import compile_recipe
from gemma_deploy.dtypes import BY_NAME
from gemma_deploy.errors import ArtifactError
from gemma_deploy.names import LAYERS, PARAMS
from tests.native.test_backend import MANY, compare_in_company, in_pieces, opened, recipe_of


@pytest.fixture(scope="module")
def compiled(native_library, tmp_path_factory):
    """An artifact of a tiny Gemma 3 in int8."""
    return compile_recipe(recipe_of(tmp_path_factory.mktemp("bits"), "gemma3_text", "w8a16")).path


@pytest.fixture(scope="module")
def ids():
    return [int(one) for one in np.random.default_rng(0).integers(3, 500, 330)]


def rounded(plan, group, but=()):
    """A plan in which matrices of layers read activations of 8 bits, but those whose name has a part of `but`."""
    wanted = (line.startswith(f"matrix name={LAYERS}") and not any(one in line for one in but) for line in lines(plan))
    made = (f"{line} input_group={group}" if one else line for line, one in zip(lines(plan), wanted, strict=True))
    return "\n".join(made)


def lines(plan):
    return plan.split("\n")


@pytest.mark.parametrize(("group", "but"), [(32, ()), (128, ("down_proj",)), (2048, ())])
def test_a_token_gives_the_same_bits_whatever_its_company(compiled, ids, group, but):
    plan = rounded(plan_in(compiled), group, but)
    compare_in_company(compiled, ids, ((1, [200, 1, 17, 100]), (3, [1, 2, 127, 128, 5])), plan=plan)


def test_groups_come_near_and_nothing_is_rounded_where_it_is_to_be_exact(compiled, ids):
    """Of random weights, without outliers, the error is that of a rounding to 127 steps: less in small groups."""
    plan = plan_in(compiled)

    def logits(text, **options):
        model = opened(compiled, text, **options)
        found = in_pieces(model, ids[:100], iter([100]))
        model.close()
        return found

    right = logits(plan, exact=True, cache="float32")
    np.testing.assert_array_equal(logits(rounded(plan, 32), exact=True, cache="float32"), right)
    errors = [np.sqrt(((logits(text) - right) ** 2).mean() / (right**2).mean()) for text in
              (plan, rounded(plan, 32), rounded(plan, 2048))]  # fmt: skip
    assert errors[0] < errors[1] < errors[2], errors
    assert 4 * errors[0] < errors[1], errors
    assert errors[2] < 0.1, errors


WRONG = {
    "differ in 'input_group'": lambda plan: rounded(plan, 64, ("k_proj",)),
    "'input_group' is 16, not a whole number from 32 to 2048": lambda plan: rounded(plan, 16),
    "'input_group' is 4096": lambda plan: rounded(plan, 4096),
    "'input_group' is 96, no power of two": lambda plan: rounded(plan, 96),
}


@pytest.mark.parametrize("words", sorted(WRONG))
def test_a_damaged_plan_is_told(compiled, words):
    with pytest.raises(ArtifactError, match=words):
        opened(compiled, WRONG[words](plan_in(compiled)))
    with pytest.raises(ArtifactError, match="differ in 'input_group'"):
        opened(compiled, rounded(plan_in(compiled), 64, ("up_proj",)))


def test_floats_have_no_groups(native_library, tmp_path):
    """An artifact of float16 holds float16, nothing is measured for it, and its plan has no groups of inputs."""
    result = compile_recipe(recipe_of(tmp_path, "gemma2", "fp16"))
    assert result.parity.passed
    manifest = Artifact.open(result.path).manifest
    matrices = {row.dtype for row in manifest.params if len(row.shape) == 2}
    assert matrices == {"float16"}
    assert not [row.name for row in manifest.params if row.name.endswith((".eps", ".scaling"))]
    assert manifest.rescaling is None
    assert "weight matrices and token table rounded to float16; arithmetic and norms float32" in {
        entry.what for entry in manifest.ledger
    }
    with pytest.raises(ArtifactError, match="'input_group' is not known"):
        opened(result.path, rounded(plan_in(result.path), 32))


@pytest.mark.slow
def test_w8a8_rounds_what_calibration_leaves_to_be_rounded(native_library, tmp_path, ids):
    """And says so; the same bits in any company and in ONNX Runtime; the gate sees where too much is rounded."""
    from tests.native.test_ort import caches, session_of, step

    path = compile_recipe(recipe_of(tmp_path, "gemma3_text", "w8a8")).path
    manifest, plan = Artifact.open(path).manifest, plan_in(path)
    kept = set(manifest.activations.kept)
    codes = [row.name for row in manifest.params if row.name.startswith(LAYERS) and BY_NAME[row.dtype].bits == 8]
    expected = {name for name in codes if name.endswith(".weight") and name.removesuffix(".weight") not in kept}
    found = {line.split()[1].removeprefix("name=") for line in lines(plan) if f"input_group={INPUT_GROUP}" in line}
    assert found == expected
    assert 0 < len(found) < len([name for name in codes if name.endswith(".weight")])
    entry = next(one for one in manifest.ledger if "rounded to 8 bits" in one.what)
    assert all(name in entry.what for name in kept)
    compare_in_company(path, ids, ((1, [200, 1, 17, 100]), (3, [1, 2, 127, 128, 5])))
    model, session = Model(plan, path / PARAMS, threads=2, cache_bytes=MANY), session_of(path / GRAPH)
    past, at, sequence = caches(session, 330), 0, model.sequence()
    for size in (60, 1, 1, 130):
        logits, past = step(session, past, ids[at : at + size], at + size, in_place=True)
        np.testing.assert_array_equal(logits, model.logits([(sequence, ids[at : at + size], 1)])[0])
        at += size
    model.close()
