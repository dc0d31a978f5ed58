"""A tiny artifact that many texts are computed on at once: windows of 8, prompts of several pages."""

import pytest

from tests.native.conftest import native_library  # noqa: F401

CONTEXT = 800


@pytest.fixture(scope="session")
def served(native_library, once):  # noqa: F811
    """An artifact of a tiny Gemma 3 in int8 for the native back end, its checkpoint beside it; read only."""

    def make(root):
        from gemma_deploy.compile import compile_recipe
        from tests.native.test_backend import recipe_of

        root.mkdir()
        compile_recipe(recipe_of(root, "gemma3_text", "w8a16", context=CONTEXT, max_position_embeddings=1024))

    return once("served", make) / "w" / "x"
