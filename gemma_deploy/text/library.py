"""Calls of the tokenizers library, whose Rust code stops at some files with an error that is no `Exception`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gemma_deploy.errors import DeployError

PANIC = "PanicException"  # pyo3's, derived from BaseException, and importable from nowhere


@contextmanager
def asking(wrong: Callable[[str], DeployError]) -> Iterator[None]:
    """Turn what the library raises, a panic of its Rust code included, into an error of ours.

    Args:
        wrong: the error that says the reason.
    """
    try:
        yield
    except DeployError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise  # Ctrl-C
        raise wrong(str(error).strip().partition("\n")[0] or type(error).__name__) from error
