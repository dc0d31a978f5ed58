"""A case on its way through the layers of the static pair: what it is fed, and what it has of every layer so far."""

from __future__ import annotations

import numpy as np

from gemma_deploy.backends.tvm_vacc.contract import StaticContract
from gemma_deploy.backends.tvm_vacc.cutting import DECODE_INPUTS, LAST_HIDDEN, Cutter
from gemma_deploy.names import PER_LAYER_VECTORS
from gemma_deploy.parity.cases import Case
from gemma_deploy.quantization.rescaling import Rescaling


class CaseState:
    """One case on its way through the layers.

    Attributes:
        prefill: inputs of iter0 and the current hidden states [B, P, H] under the name of the value cut at.
        steps: the same for every decode step, [B, 1, H].
        last: as `prefill`, of the positions that layers compute of which the graph computes the last one alone: that
            one, or each position by itself; empty in front of those layers.
        made: keys and values of prompts of the layers whose caches others read, `present.{i}.key`; caches: those caches
            behind the last step, `past_key_values.{i}.key`.
    """

    def __init__(
        self, case: Case, contract: StaticContract, rescaling: Rescaling, *, positions_first: bool = False
    ) -> None:
        self.case, self.contract, self.rescaling, self.turned = case, contract, rescaling, not positions_first
        batch, width, context = len(case.prompts), contract.prefill, contract.context
        ids, mask, positions = (np.zeros((batch, width), np.int64) for _ in range(3))
        for row, prompt in enumerate(case.prompts):
            start = width - len(prompt)
            ids[row, start:], mask[row, start:], positions[row, start:] = prompt, 1, np.arange(len(prompt))
        self.prefill = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        self.steps = []
        for step in range(case.steps):
            seen = np.zeros((batch, context + 1), np.int64)
            seen[:, :width], seen[:, width : width + step], seen[:, -1] = mask, 1, 1
            self.steps.append(
                {
                    "input_ids": np.array([[row[step]] for row in case.forced], np.int64),
                    "attention_mask": seen,
                    "position_ids": np.array([[len(prompt) + step] for prompt in case.prompts], np.int64),
                }
            )

        self.last: list[dict[str, np.ndarray]] = []
        self.made: dict[str, np.ndarray] = {}
        self.caches: dict[str, np.ndarray] = {}

    def cut_to_last(self, cutter: Cutter, layer: int, *, every: bool) -> None:
        """Go on with the last position, as the prefill graph does in front of `layer` or has done before.

        Args:
            every: or with each position, as if it were the last.
        """
        hidden = cutter.entering(layer)
        names = [name for name in cutter.at_last if name != LAST_HIDDEN or name == hidden]
        names = [name for name in names if not self.last or name not in self.last[0]]
        if self.last and not names:
            return
        known = [*DECODE_INPUTS, *(name for name in (PER_LAYER_VECTORS,) if name in self.prefill)]
        of = {name: cutter.at_last[name] for name in names}
        if not every:
            given = [*known, *(value for value, _ in of.values() if value in self.prefill)]
            made = cutter.piece(list(dict.fromkeys(given)), names)(self.prefill)
            found = [dict(zip(names, made, strict=True))]
        else:
            wholes = [value for value, _ in of.values()]
            missing = list(dict.fromkeys(value for value in wholes if value not in self.prefill))
            values = dict(zip(missing, cutter.piece(known, missing)(self.prefill), strict=True))
            values |= {name: self.prefill[name] for name in wholes if name not in values}
            found = [
                {name: values[value].take([at], axis) for name, (value, axis) in of.items()}
                for at in range(self.contract.prefill)
            ]
        before = self.last or [{} for _ in found]
        self.last = [{**old, **new} for old, new in zip(before, found, strict=True)]

    def new_at(self, slot: int) -> dict[str, np.ndarray]:
        """Caches of other layers in the step that fills `slot`: whole as what is past, and that slot as what is new."""
        new = {
            name.replace("past_key_values", "present"): cache[:, :, slot : slot + 1]
            for name, cache in self.caches.items()
        }
        return {**self.caches, **new}

    def rows(self, name: str) -> list[np.ndarray]:
        """A value of every row, [prompt + steps, features] float32, padding removed and rescaling undone."""
        found, scale = [], np.float32(2.0 ** self.rescaling.of(name))
        for row, prompt in enumerate(self.case.prompts):
            prompt_rows = [feeds[name] for feeds in self.last or [self.prefill] if name in feeds] or [
                self.prefill[name]
            ]
            flat = [_flat(value, row, self.turned) for value in prompt_rows]
            parts = [np.concatenate(flat)[-len(prompt) :]]
            parts += [_flat(step[name], row, self.turned) for step in self.steps if name in step]
            found.append(np.concatenate(parts).astype(np.float32) * scale)
        return found


def _flat(value: np.ndarray, row: int, turned: bool) -> np.ndarray:
    """[B, positions, ...], or of four dimensions [B, heads, positions, D] where `turned`, -> [positions, features]."""
    if value.ndim == 4 and turned:
        value = np.swapaxes(value, 1, 2)
    return value[row].reshape(value.shape[1], -1)
