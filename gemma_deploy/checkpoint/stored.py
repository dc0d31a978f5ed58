"""One tensor of an open file, under the name that it has there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from gemma_deploy.checkpoint.safetensors_reader import Entry, SafetensorsFile

if TYPE_CHECKING:
    from gemma_deploy.checkpoint.gguf_reader import GgufEntry, GgufFile

File = TypeVar("File", bound="SafetensorsFile | GgufFile")


@dataclass(frozen=True)
class Stored(Generic[File]):
    """A tensor of a file; see `Rows`.

    Args:
        file: the open file; name: of the tensor there.
    """

    file: File
    name: str

    @property
    def entry(self) -> Entry | GgufEntry:
        """Shape, dtype and byte offsets."""
        return self.file.entries[self.name]

    @property
    def parts(self) -> tuple[Stored[File], ...]:
        """The tensors it is read from: itself."""
        return (self,)

    @property
    def nbytes(self) -> int:
        """In the file."""
        return self.entry.stop - self.entry.start

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32."""
        return self.file.rows(self.name, start, stop)

    def raw_rows(self, start: int, stop: int) -> np.ndarray:
        """The same rows as stored."""
        return self.file.raw_rows(self.name, start, stop)

    def whole(self) -> np.ndarray:
        """All of it as float32."""
        return self.rows(0, self.entry.shape[0])
