"""How much the model loses when one layer alone is stored as the artifact stores it: KL of the final logits.

All variants pass through the layers together: at layer j those that were changed before it, and the unchanged one,
run its own weights; the unchanged one's input runs the stored ones and becomes variant j. Each layer's weights are read
twice, one layer is in memory at a time, and the variants' hidden states lie on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.calibration.beside import ReadBeside
from gemma_deploy.calibration.layer_weights import embed, head_input, loaded
from gemma_deploy.calibration.shards import LayerPass, LayerSetting, Shard, StackTemplate, cache_rows
from gemma_deploy.calibration.states import HiddenStates
from gemma_deploy.checkpoint import WeightSource
from gemma_deploy.machine import give_memory_back
from gemma_deploy.parity.reference import TorchSource
from gemma_deploy.progress import Tick

TOKENS = 256  # of one window; the six worst layers of the real 270M are among its seven worst on 1024 (65 s, 265 s)
HEAD_BYTES = 64 << 20  # logits of one variant at a time


@torch.inference_mode()
def measure_sensitivity(
    checkpoint: WeightSource,
    stored: ArtifactWeights,
    ids: Sequence[int],
    *,
    scratch: Path,
    embed_scale: str = "exact",
    progress: Tick | None = None,
) -> dict[str, Any]:
    """Mean KL in nats a token when only one layer, or only the token tables with the LM head, are the artifact's.

    Args:
        stored: the artifact's weights; its activations and cache are not rounded here.
        ids: a window of token ids, BOS first; the first `TOKENS` are used.
        scratch: directory for hidden states.
        progress: called with (done, all of it), half of which is layers, half the logits of the variants.

    Returns:
        `tokens`, `layers` (KL by layer) and `table`.

    Raises:
        CalibrationError: the disk is full. NotBuiltError: there is no patched model for this generation.
    """
    config, tokens = checkpoint.config, list(ids)[:TOKENS]
    count, seqlen = config.num_hidden_layers, len(tokens)
    stack_template = StackTemplate(LayerSetting(config, embed_scale, seqlen, checkpoint.path))
    unchanged, table = count, count + 1  # rows after those of the layers
    with (
        closing(HiddenStates((count + 2, seqlen, config.carried), scratch / "variants.f32", 0)) as states,
        closing(_Variants((checkpoint, stored), stack_template, states)) as variants,
    ):
        _embed_both(checkpoint, stored, tokens, stack_template, states, (unchanged, table), scratch)
        variants.make_vectors(tokens)
        for index in range(count):
            layer = LayerPass(stack_template, index)
            with loaded(layer.module, stored, layer.name):
                changed = variants.passed(layer, unchanged, [index])
            with loaded(layer.module, checkpoint, layer.name):
                for variant in (*range(index), unchanged, table):
                    later = range(index + 1, count) if variant == unchanged else ()  # so far they are unchanged
                    states.write(variant, variants.passed(layer, variant, [variant, *later]))
            states.write(index, changed)
            give_memory_back()
            if progress is not None:
                progress(index + 1, 2 * count)
        normed = []
        sources: list[tuple[WeightSource, Sequence[int]]] = [(checkpoint, range(count + 1)), (stored, [table])]
        for source, rows in sources:
            with head_input(source, stack_template.stack) as made:
                normed += [made(states.read(i))[0] for i in rows]

    def second_half(done: float, total: float) -> None:
        if progress is not None:
            progress(count * (1 + done / total), 2 * count)

    losses = _losses(TorchSource(checkpoint, "hf"), TorchSource(stored, "patched"), normed, second_half)
    return {"tokens": seqlen, "layers": losses[:count], "table": losses[count]}


class _Variants:
    """What layers read of the variants besides, and hidden states on their way through a layer.

    The vectors of the last variant, whose tables are the artifact's, are made from these; all others' are the
    checkpoint's.

    Args:
        states: of all variants, rows as in `measure_sensitivity`.
    """

    def __init__(
        self, sources: tuple[WeightSource, WeightSource], stack_template: StackTemplate, states: HiddenStates
    ) -> None:
        self.sources, self.stack, self.states = sources, stack_template.stack, states
        folders = [states.file.with_suffix(name) for name in (".checkpoint", ".artifact")]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        self.beside = [ReadBeside(sources[0].config, folder, states.shape[:2]) for folder in folders]

    def make_vectors(self, tokens: Sequence[int]) -> None:
        """Of the one window that all variants read."""
        ids = np.array([tokens] * self.states.shape[0])
        for source, beside in zip(self.sources, self.beside, strict=True):
            beside.make_vectors(source, self.stack, ids)

    def passed(self, layer: LayerPass, variant: int, becomes: Sequence[int]) -> np.ndarray:
        """[seqlen, hidden]: what a layer gives for a variant.

        Args:
            becomes: variants that have the keys and values of this pass.
        """
        count, spec, shared = self.states.shape[0], layer.spec, self.beside[0]
        vectors = self.beside[variant == count - 1].vectors(spec, range(count))
        shard = Shard(range(count), self.states, vectors, shared.source(spec))
        present: dict[str, torch.Tensor] = {}
        hidden = layer.run(self.states.read(variant), cached=present.__setitem__, beside=shard.beside(variant, spec))
        if (kept := shared.kept(spec)) is not None:
            for other in becomes:
                kept.write(other, *cache_rows(present))
        return hidden[0].numpy()

    def close(self) -> None:
        """Give the disk back."""
        for beside in self.beside:
            beside.close()
            beside.folder.rmdir()


def _embed_both(
    checkpoint: WeightSource,
    stored: ArtifactWeights,
    tokens: Sequence[int],
    stack_template: StackTemplate,
    states: HiddenStates,
    rows: tuple[int, int],
    scratch: Path,
) -> None:
    """The window through the checkpoint's table and the artifact's."""
    ids = np.array([tokens])
    with ExitStack() as stack:
        sources: tuple[WeightSource, WeightSource] = (checkpoint, stored)
        for row, source in zip(rows, sources, strict=True):
            one = stack.enter_context(closing(HiddenStates((1, *states.shape[1:]), scratch / f"embedded-{row}.f32", 0)))
            embed(source, ids, stack_template.stack, states=one)
            states.write(row, one.read(0))


def _losses(exact: TorchSource, changed: TorchSource, normed: Sequence[torch.Tensor], progress: Tick) -> list[float]:
    """KL of every variant from the last but one, which is the unchanged; the last is read by the artifact's head."""
    *layers, unchanged, table = normed
    step = max(1, HEAD_BYTES // (4 * exact.checkpoint.config.vocab_size))
    totals = [0.0] * (len(layers) + 1)
    for start in range(0, len(unchanged), step):
        block = slice(start, start + step)
        reference = _log_probabilities(exact, unchanged[block])
        for i, variant in enumerate([*layers, table]):
            head = changed if i == len(layers) else exact
            test = _log_probabilities(head, variant[block])
            totals[i] += float((reference.exp() * (reference - test)).sum(dtype=torch.float64))
            del test
            progress(start + len(reference) * (i + 1) / len(totals), len(unchanged))
        give_memory_back()
    return [total / len(unchanged) for total in totals]


def _log_probabilities(source: TorchSource, features: torch.Tensor) -> torch.Tensor:
    """[n, V] float32."""
    return torch.from_numpy(source.head(features.numpy())).log_softmax(-1)
