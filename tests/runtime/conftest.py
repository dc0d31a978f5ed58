"""A tokenizer for the tests of the runtime."""

import pytest

from tests.runtime.make import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
