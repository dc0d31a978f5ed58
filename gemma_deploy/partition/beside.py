"""Whose keys and values the layers of a part read, where the last layers of a model read those of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.partition.spans import Span


@dataclass(frozen=True)
class Reads:
    """Whose keys and values the layers of a part read, in numbers of the part and of the model.

    Args:
        places: of each layer of the part, the layer of the part in whose cache its keys and values are. Where an
            earlier part makes them, that is the first one here which reads them.
        first_sharing: the part's first layer without keys and values of its own; None where all have some.
        borrowed: layer of the model, in an earlier part -> the place here.
        made: layer of the model, in this part, that later parts read -> its number here.
        passed: layers of the model whose keys and values later parts read and this part has, made here or not.
    """

    places: tuple[int, ...]
    first_sharing: int | None
    borrowed: dict[int, int]
    made: dict[int, int]
    passed: tuple[int, ...]

    @classmethod
    def of(cls, config: ModelConfig, span: Span) -> Reads:
        """Of layers [start, stop) of a model."""
        here, behind = config.layers[span.start : span.stop], config.layers[span.stop :]
        borrowed: dict[int, int] = {}
        places = []
        for number, layer in enumerate(here):
            source = layer.keys_of
            places.append(source - span.start if source >= span.start else borrowed.setdefault(source, number))
        wanted = {layer.cache_from for layer in behind if layer.cache_from is not None}
        passed = tuple(sorted(source for source in wanted if source < span.stop))
        first = next((number for number, layer in enumerate(here) if layer.cache_from is not None), None)
        made = {source: source - span.start for source in passed if source >= span.start}
        return cls(tuple(places), first, borrowed, made, passed)
