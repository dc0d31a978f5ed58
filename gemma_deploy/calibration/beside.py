"""What layers read of a window beside hidden states, on disk: a vector of each token, keys and values of other layers.

A token's vectors depend on nothing but the token: they are made once for each that occurs, of all layers, before the
first of these. The keys and values that later layers share are written when their layer is passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.calibration.executors import Executor
from gemma_deploy.calibration.layer_weights import loaded, refuse_nonfinite, rows_of
from gemma_deploy.calibration.points import cache_columns
from gemma_deploy.calibration.shards import Readable, Shard, StatesByValue
from gemma_deploy.calibration.states import HiddenStates
from gemma_deploy.checkpoint import ModelConfig, WeightSource
from gemma_deploy.machine import one_torch_thread
from gemma_deploy.names import EMBEDDING_WEIGHT, PER_LAYER_TABLE

MADE_TOGETHER = 256  # tokens whose vectors of all layers are in memory


def vectors_file(folder: Path) -> Path:
    """Where the vectors of the tokens that occur lie."""
    return folder / "vectors.f32"


def shared_file(folder: Path, layer: int) -> Path:
    """Where a layer's keys and values lie."""
    return folder / f"shared-{layer:03d}.f32"


@dataclass(frozen=True)
class LayerVectors:
    """The vectors of one layer, by window.

    Args:
        file: [layers, tokens, size] float32; layer: of the model; tokens, size: the array's.
        places: [windows, seqlen], of each token among those that occur; first: the number of the first window.
    """

    file: Path
    layer: int
    tokens: int
    size: int
    places: np.ndarray
    first: int

    def read(self, window: int) -> np.ndarray:
        """[seqlen, size], a copy."""
        offset = 4 * self.layer * self.tokens * self.size
        rows = np.memmap(self.file, np.float32, "r", offset, (self.tokens, self.size))
        return np.array(rows[self.places[window - self.first]])


class ReadBeside:
    """All that a model's layers read of some windows beside hidden states; nothing, of most models.

    Args:
        folder: of the files.
        shape: windows and tokens of each, of the keys and values that are kept.
        there: those of layers before this one are on disk already.
    """

    def __init__(self, config: ModelConfig, folder: Path, shape: tuple[int, int], *, there: int = 0) -> None:
        self.config, self.folder = config, folder
        self._vectors: tuple[Path, np.ndarray, int] | None = None
        self._shared: dict[int, HiddenStates] = {}
        self._shape = shape
        for layer in config.cache_sources:
            if layer.index < there:
                self._shared[layer.index] = self._store(layer, there=True)

    def make_vectors(self, checkpoint: WeightSource, stack: Any, ids: np.ndarray) -> None:
        """Make every layer's vectors of some windows.

        Args:
            stack: of the patched model, on the meta device; ids: [nsamples, seqlen].

        Raises:
            CalibrationError: they hold NaN or infinity, or the disk is full.
        """
        table = self.config.per_layer
        if table is None:
            return
        tokens, places = np.unique(ids, return_inverse=True)
        places = places.reshape(ids.shape).astype(np.int32)
        file = vectors_file(self.folder)
        HiddenStates((table.layers, len(tokens), table.size), file, 0)  # takes the room
        name = PER_LAYER_TABLE if table.rows else table.projection  # for messages
        projection, norm = (stack.get_submodule(one.removeprefix("model.")) for one in (table.projection, table.norm))
        with (
            one_torch_thread(),
            loaded(projection, checkpoint, table.projection),
            loaded(norm, checkpoint, table.norm),
            open(file, "r+b") as written,
        ):
            for start in range(0, len(tokens), MADE_TOGETHER):
                some = tokens[start : start + MADE_TOGETHER]
                made = vectors_of(checkpoint, stack, some)
                refuse_nonfinite(made, checkpoint.path, name, window=int(np.argwhere(ids == some[0])[0, 0]))
                for layer in range(table.layers):
                    written.seek(4 * (layer * len(tokens) + start) * table.size)
                    written.write(made[:, layer].contiguous().numpy().data.cast("B"))
        self._vectors = file, places, len(tokens)

    def shard(self, executor: Executor, layer: LayerSpec, *, states: Readable, windows: range) -> Shard:
        """Windows as a worker of the executor reads them at a layer."""
        carried = executor.shares == "nothing"

        def seen(store: Readable | None) -> Readable | None:
            return StatesByValue.of(store, windows) if carried and store is not None else store

        hidden = seen(states)
        assert hidden is not None
        return Shard(windows, hidden, seen(self.vectors(layer, windows)), seen(self.source(layer)))

    def source(self, layer: LayerSpec) -> HiddenStates | None:
        """The keys and values that a layer reads of an earlier one; None where it has its own."""
        return None if layer.cache_from is None else self._shared[layer.cache_from]

    def vectors(self, layer: LayerSpec, windows: range) -> LayerVectors | None:
        """The vectors that a layer adds; None where it adds none."""
        if layer.per_layer is None or self._vectors is None:
            return None
        file, places, tokens = self._vectors
        some = places[windows.start : windows.stop]
        return LayerVectors(file, layer.index, tokens, layer.per_layer.size, some, windows.start)

    def kept(self, layer: LayerSpec) -> HiddenStates | None:
        """Where keys and values of a layer go, when later layers read them; None where none do."""
        if layer not in self.config.cache_sources:
            return None
        if layer.index not in self._shared:
            self._shared[layer.index] = self._store(layer)
        return self._shared[layer.index]

    def close(self) -> None:
        """Give the disk back."""
        vectors_file(self.folder).unlink(missing_ok=True)
        for store in self._shared.values():
            store.close()

    def _store(self, layer: LayerSpec, *, there: bool = False) -> HiddenStates:
        shape = (*self._shape, cache_columns(layer))
        return HiddenStates(shape, shared_file(self.folder, layer.index), 0, there=there)


@torch.inference_mode()
def vectors_of(checkpoint: WeightSource, stack: Any, tokens: np.ndarray) -> torch.Tensor:
    """[tokens, layers, size]: what each layer adds of some tokens; the stack's projection and its norm are loaded."""
    embedded = rows_of(checkpoint, EMBEDDING_WEIGHT, tokens)
    columns, scale = checkpoint.embedding_scale(), float(stack.embed_tokens.scale_value(torch.float32))
    embeds = torch.from_numpy(embedded * (np.float32(scale) if columns is None else columns))[None]
    table = checkpoint.config.per_layer
    if table is None or not table.rows:
        own: torch.Tensor = stack.per_layer_inputs(None, embeds)[0]
        return own
    known = np.where(tokens < table.rows, tokens, 0)  # tokens without a row have the first one's
    rows = torch.from_numpy(rows_of(checkpoint, f"{PER_LAYER_TABLE}.weight", known))[None]
    rows = rows * stack.embed_tokens_per_layer.scale_value(torch.float32)
    made: torch.Tensor = stack.project_per_layer(rows, embeds)[0]
    return made
