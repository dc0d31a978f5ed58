"""The library of src/, through its C ABI (src/capi.cpp)."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.backends.native.binding import SIGNATURES, Piece, Ranks
from gemma_deploy.errors import START_AGAIN, ArtifactError, ChangedError, DeployError, UsageError
from gemma_deploy.runtime.many import NoRoomError, Ranked
from gemma_deploy.runtime.session import VERIFY

LIBRARY = "libgemma_deploy.so"
FOLDER = Path(__file__).parent
LEVEL_VARIABLE = "GEMMA_DEPLOY_KERNELS"
MESSAGE_BYTES = 1000
NO_PAGES, TOO_LONG, CUT = 2, 3, 4  # answers of the C ABI that are no faults
CACHE_BYTES = 8 << 30  # of all sequences together, at most; pages are taken as they are needed
INSTALL = (
    "install a C++17 compiler (Debian: apt install g++) and the package again from its source, "
    "or a wheel of this platform"
)


@dataclass(frozen=True)
class ThreadCounts:
    """What became of work that threads share, since a model was opened.

    Args:
        pieces: of work in all; helped: done by other threads than the caller's.
        rests: how often these were sent to rest, because the machine was busy and they cost more than they gave.
        waited: seconds that the caller waited for pieces that they held.
    """

    pieces: int
    helped: int
    rests: int
    waited: float


@dataclass(frozen=True)
class ScreenCounts:
    """What a screened head read, since a model was opened; all 0 of another head.

    Args:
        tokens: whose logits were computed; rows: of the table, read whole for them.
        proofs: tokens whose largest logit was not certain with the candidates; more: rows that were read for these
            besides.
    """

    tokens: int
    rows: int
    proofs: int
    more: int


def library_path() -> Path:
    """Where the library lies.

    Raises:
        UsageError: it was not built.
    """
    path = FOLDER / LIBRARY
    if not path.is_file():
        raise UsageError("the library of backend.type native was not built", where=str(path), next_step=INSTALL)
    return path


@functools.cache
def _loaded() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path()))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, list(arguments)
    return library


def levels() -> tuple[str, ...]:
    """Levels of CPU features that the library has for this processor, the best first.

    Raises:
        UsageError: the library was not built.
    """
    found: bytes = _loaded().gemma_levels()
    return tuple(found.decode().split())


def level_wanted() -> str:
    """The level that the environment forces; "" for the best one.

    Raises:
        UsageError: this processor has none of that name.
    """
    wanted = os.environ.get(LEVEL_VARIABLE, "")
    if wanted and wanted not in levels():
        raise UsageError(
            f"{LEVEL_VARIABLE}={wanted}: this processor has no such level",
            expected="one of " + ", ".join(levels()),
            next_step="name one of these, or unset the variable",
        )
    return wanted


def level_here() -> str:
    """The level that models are opened with: what the environment forces, or the best that this processor runs.

    Raises:
        UsageError: the library was not built, or this processor has no level of that name.
    """
    return level_wanted() or levels()[0]


def read_plan(graph: Path) -> str:
    """The plan in the graph of an artifact.

    Raises:
        ArtifactError: the graph is missing, or holds none. UsageError: the library was not built.
    """
    message, room = ctypes.create_string_buffer(MESSAGE_BYTES), 0
    while True:
        plan = ctypes.create_string_buffer(room)
        size = int(_loaded().gemma_plan(os.fsencode(graph), plan, room, message, MESSAGE_BYTES))
        if size < 0:
            raise _damaged(message, graph)
        if size <= room:
            return plan.raw[:size].decode(errors="replace")
        room = size


def _damaged(message: ctypes.Array[ctypes.c_char], file: Path) -> ArtifactError:
    said = message.value.decode(errors="replace")
    return ArtifactError(said.removeprefix(f"{file}: "), where=str(file), next_step=VERIFY)


class Model:
    """A model that the library has open. One call at a time is computed; any thread may make it.

    Args:
        plan: the text that plan.py makes; parameters: the parameter file.
        threads: 0 for as many as there are cores; cache_bytes: of all sequences' keys and values together.
        cache: form of keys and values, `bfloat16`, `float32` or `int8`; "" for the plan's own.
        exact: compute with float32 products of what codes stand for, nothing rounded: for a proof.

    Attributes:
        hidden: numbers of a hidden state; vocabulary: logits of a token; context: positions there are.

    Raises:
        ArtifactError: the plan or the file is damaged. UsageError: the library was not built.
    """

    def __init__(
        self,
        plan: str,
        parameters: Path,
        *,
        threads: int = 0,
        cache_bytes: int = CACHE_BYTES,
        cache: str = "",
        exact: bool = False,
    ) -> None:
        self._library, self._handle, self._held = _loaded(), None, 0
        message, text = ctypes.create_string_buffer(MESSAGE_BYTES), plan.encode()
        count = threads or len(os.sched_getaffinity(0))
        self._handle = self._library.gemma_open(
            text, len(text), os.fsencode(parameters), level_wanted().encode(), count, cache_bytes, cache.encode(),
            int(exact), message, MESSAGE_BYTES,
        )  # fmt: skip
        if not self._handle:
            raise _damaged(message, parameters)
        self.hidden = int(self._library.gemma_hidden(self._handle))
        self.vocabulary = int(self._library.gemma_vocabulary(self._handle))
        self.context = int(self._library.gemma_context(self._handle))
        self._stride = int(self._library.gemma_stride(self._handle))
        self._parameters = parameters

    def close(self) -> None:
        """End its threads and give its memory back; sequences are gone."""
        handle, self._handle = self._handle, None
        if handle:
            self._library.gemma_close(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    @property
    def level(self) -> str:
        """The level of CPU features that computes it."""
        name: bytes = self._library.gemma_level(self._handle)
        return name.decode()

    def sequence(self, like: int = 0, *, adapter: int = 0) -> int:
        """A new sequence, empty or with the text of another: its number.

        Args:
            like: one whose text it begins with, and whose adapter it goes on with.
            adapter: that an empty one is computed with (`load_adapter`); 0: with none.
        """
        made: int = self._library.gemma_sequence_new(self._handle, like)
        if not made:
            self._check(1)
        self._held += 1
        if adapter:
            self._check(self._library.gemma_sequence_adapt(self._handle, made, adapter))
        return made

    def load_adapter(self, text: str, panels: np.ndarray) -> int:
        """An adapter that sequences may be computed with: its number.

        Args:
            text, panels: what `packed` of adapters.py makes; the library keeps a copy.

        Raises:
            DeployError: they do not fit the model.
        """
        data, lines = np.ascontiguousarray(panels).view(np.uint8), text.encode()
        made: int = self._library.gemma_adapter_load(self._handle, lines, len(lines), data.ctypes.data, data.size)
        if not made:
            self._check(1)
        return made

    def drop_adapter(self, adapter: int) -> None:
        """Forget an adapter; sequences that were begun with it go on with it."""
        self._check(self._library.gemma_adapter_free(self._handle, adapter))

    def drop(self, sequence: int) -> None:
        """Forget a sequence."""
        self._check(self._library.gemma_sequence_free(self._handle, sequence))
        self._held -= 1

    def rewind(self, sequence: int, length: int) -> None:
        """Forget what comes after `length` tokens of a sequence.

        Raises:
            DeployError: a window has already given back what it would see there.
        """
        self._check(self._library.gemma_sequence_rewind(self._handle, sequence, length))

    def logits(self, pieces: Sequence[tuple[int, Sequence[int], int]], into: np.ndarray | None = None) -> np.ndarray:
        """Compute tokens of several sequences together.

        Args:
            pieces: number of a sequence, the tokens that follow it, and of how many of the last of them logits are
                wanted.
            into: room for them that `room` made, for no new memory at every step.

        Returns:
            [wanted, V] float32, a part of `into` where that is given.

        Raises:
            DeployError: no memory for their caches is left.
        """
        rows = sum(wanted for _, _, wanted in pieces)
        made = self.room(rows) if into is None else into[:rows]
        self._step(pieces, None, made)
        return made[:, : self.vocabulary]

    def room(self, rows: int) -> np.ndarray:
        """Memory for the logits of so many tokens: [rows, V or a little more] float32."""
        return np.empty((rows, self._stride), np.float32)

    def ranked(
        self,
        pieces: Sequence[tuple[int, Sequence[int] | np.ndarray, int]],
        *,
        top: int = 0,
        asked: Sequence[int] | np.ndarray | None = None,
    ) -> Ranked:
        """As `logits`, of these only the largest few, some that are asked for, and what makes them probabilities.

        Args:
            top: how many of the largest, at most 1024; asked: a token for each row.

        Raises:
            DeployError: no memory for their caches is left, or no token is asked for.
        """
        rows = sum(wanted for _, _, wanted in pieces)
        made, ranks, _kept = _ranks(rows, top, asked)
        given = _pieces(pieces)
        self._check(self._library.gemma_step_ranked(self._handle, given[0], len(pieces), ctypes.byref(ranks), rows))
        return made

    def rank(self, logits: np.ndarray, *, top: int = 0, asked: Sequence[int] | np.ndarray | None = None) -> Ranked:
        """As `ranked`, of logits that are there already.

        Args:
            logits: [n, V], the first rows of what `room` made and `head` or `logits` filled.
        """
        if logits.dtype != np.float32 or logits.strides != (4 * self._stride, 4):
            raise ValueError("these are no rows of a room for logits")
        made, ranks, _kept = _ranks(len(logits), top, asked)
        where = logits.ctypes.data
        self._check(self._library.gemma_rank(self._handle, where, len(logits), ctypes.byref(ranks)))
        return made

    def held(self) -> int:
        """Sequences that there are."""
        return self._held

    def cache_used(self) -> int:
        """Bytes of the keys and values of all sequences."""
        return int(self._library.gemma_cache_used(self._handle))

    def thread_counts(self) -> ThreadCounts:
        """What became of work that threads share."""
        numbers = (ctypes.c_uint64 * 4)()
        self._check(self._library.gemma_threads(self._handle, numbers))
        return ThreadCounts(numbers[0], numbers[1], numbers[2], numbers[3] / 1e9)

    def screen_counts(self) -> ScreenCounts:
        """What a screened head read."""
        numbers = (ctypes.c_uint64 * 4)()
        self._check(self._library.gemma_screened(self._handle, numbers))
        return ScreenCounts(*numbers)

    def normed(self, pieces: Sequence[tuple[int, Sequence[int] | np.ndarray, int]]) -> np.ndarray:
        """As `logits`, what leaves the final norm: [wanted, hidden] float32."""
        rows = sum(wanted for _, _, wanted in pieces)
        made = np.empty((rows, self.hidden), np.float32)
        self._step(pieces, made, None)
        return made

    def head(self, normed: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
        """Logits of what left the final norm: [n, hidden] -> [n, V] float32, a part of `into` where that is given."""
        rows = np.ascontiguousarray(normed, np.float32)
        made = self.room(len(rows)) if into is None else into[: len(rows)]
        self._check(self._library.gemma_head(self._handle, rows.ctypes.data, len(rows), made.ctypes.data))
        return made[:, : self.vocabulary]

    def _step(
        self,
        pieces: Sequence[tuple[int, Sequence[int] | np.ndarray, int]],
        normed: np.ndarray | None,
        logits: np.ndarray | None,
    ) -> None:
        given = _pieces(pieces)
        rows = len(normed) if normed is not None else 0 if logits is None else len(logits)
        where = (None if one is None else one.ctypes.data for one in (normed, logits))
        self._check(self._library.gemma_step(self._handle, given[0], len(pieces), *where, rows))

    def _check(self, status: int) -> None:
        if status == NO_PAGES:
            raise NoRoomError(
                "no memory is left for the keys and values of these sequences",
                next_step="end sequences that are no longer needed, or open the model with room for more",
            )
        if status:
            message = self._library.gemma_error(self._handle).decode(errors="replace")
            if status == TOO_LONG:
                raise UsageError(
                    message,
                    next_step="shorten it, or compile with a longer second length in frontend.shape.input_ids",
                )
            if status == CUT:
                raise ChangedError(
                    "the weights were cut short, or can no longer be read",
                    where=str(self._parameters),
                    next_step=START_AGAIN,
                )
            raise DeployError(message, next_step="this is a bug: report it")


def _ranks(rows: int, top: int, asked: Sequence[int] | np.ndarray | None) -> tuple[Ranked, Ranks, np.ndarray | None]:
    """Room for an answer, as the library sees it, and the tokens that have to live as long."""
    ids, logits = np.empty((rows, top), np.int32), np.empty((rows, top), np.float32)
    sums, tokens, found = np.empty(rows, np.float32), None, None
    if asked is not None:
        tokens, found = np.array(asked, np.int32), np.empty(rows, np.float32)
        if len(tokens) != rows:
            raise ValueError(f"{len(tokens)} tokens are asked for, for {rows} rows")
    where = (None if one is None else one.ctypes.data for one in (ids, logits, sums, tokens, found))
    return Ranked(ids, logits, sums, found), Ranks(top, *where), tokens


def _pieces(pieces: Sequence[tuple[int, Sequence[int] | np.ndarray, int]]) -> tuple[Any, list[np.ndarray]]:
    """As the library reads them, and the tokens that have to live as long."""
    tokens = [np.asarray(ids, np.int32) for _, ids, _ in pieces]
    made = (
        Piece(sequence, len(ids), wanted, 0, ids.ctypes.data)
        for (sequence, _, wanted), ids in zip(pieces, tokens, strict=True)
    )
    return (Piece * len(pieces))(*made), tokens
