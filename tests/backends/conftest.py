"""Tiny models' parameter files and their references, made once a process; read only."""

import numpy as np
import pytest

from tests.backends import make


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(generation, form of the weights, config changes) -> parameter file and what it stands for."""
    known = {}

    def get(kind, form="fp32", **changes):
        key = kind, form, *sorted(changes.items())
        if key not in known:
            known[key] = make.make(tmp_path_factory.mktemp(f"{kind}-{form}"), kind, form, **changes)
        return known[key]

    return get


@pytest.fixture(scope="session")
def logits_of(made):
    """(generation, form, tokens, config changes) -> logits [tokens, V] of transformers' own class."""
    known = {}

    def get(kind, form, tokens, **changes):
        one = made(kind, form, **changes)
        if id(one) not in known:
            known[id(one)] = make.reference(one)
        return make.expected_logits(known[id(one)], tokens)

    return get


@pytest.fixture(scope="session")
def tokens():
    """Five windows of 8."""
    return [2, *map(int, np.random.default_rng(3).integers(3, 500, 43))]
