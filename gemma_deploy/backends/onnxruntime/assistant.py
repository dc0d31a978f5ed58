"""Guesses of a drafter that reads the keys, values and hidden states of the model it guesses for: `run --draft`.

A step begins from the newest token, which that model has not read, and the hidden state in front of it. Each guess is
made from the one before it and the drafter's own next state; all have the position of the newest token, and nothing is
written into any cache. As in transformers' SinglePositionMultiTokenCandidateGenerator, but for the keys of a guess that
was wrong, which that one reads once more (findings/transformers-assistant-reads-a-rejected-key.sh).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.backends.onnxruntime.in_place import OrtModel, OrtSequence
from gemma_deploy.backends.onnxruntime.options import GRAPH
from gemma_deploy.backends.onnxruntime.window import CACHES
from gemma_deploy.errors import ArtifactError, UsageError
from gemma_deploy.graph.contract import ENTERING, SHARED_KV, TOKEN_STATES
from gemma_deploy.runtime import draft
from gemma_deploy.runtime.draft import Drawing, check_draft
from gemma_deploy.runtime.sampling import Chances, Sampler
from gemma_deploy.runtime.session import VERIFY, load_file, open_graph
from gemma_deploy.runtime.speculative import Guess
from gemma_deploy.text.files import TOKENIZER

if TYPE_CHECKING:
    from gemma_deploy.artifact.manifest import Manifest
    from gemma_deploy.runtime.engine import Engine

PARTS = ("key", "value")


class AssistantModel:
    """The graph of a drafter, and where its inputs come from.

    Args:
        artifact_dir: directory with model.onnx and params.safetensors; manifest: of the artifact.
        sources: kind of layer -> layer of the other model whose caches are read.
        threads: of one operator; 0 for as many as there are cores.

    Raises:
        ArtifactError: a file is missing or damaged, or is not what the manifest says.
    """

    def __init__(
        self, artifact_dir: str | Path, manifest: Manifest, *, sources: Mapping[str, int], threads: int = 0
    ) -> None:
        self.path = Path(artifact_dir).resolve()
        self.context_length, self.vocab_size = manifest.contract.context, manifest.contract.vocab_size
        self.session = open_graph(load_file(self.path / GRAPH), self.path, threads=threads)
        given = {value.name for value in self.session.get_inputs()}
        self.caches = {
            f"{SHARED_KV}.{kind}.{part}": f"past_key_values.{layer}.{part}"
            for kind, layer in sources.items()
            for part in PARTS
        }
        if given != {ENTERING, "attention_mask", *self.caches}:
            raise ArtifactError(
                f"takes other inputs than the manifest says: {', '.join(sorted(given))[:200]}",
                where=str(self.path / GRAPH),
                next_step=VERIFY,
            )

    def step(self, entering: np.ndarray, sequence: OrtSequence, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits [V] and the following state [backbone] behind a token's embedding and the state before it."""
        binding = self.session.io_binding()
        binding.bind_cpu_input(ENTERING, entering[None, None])
        binding.bind_cpu_input("attention_mask", np.ones((1, positions), np.int64))
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(name, sequence.caches[cache])
        for name in ("logits", TOKEN_STATES):
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        logits, state = (value.numpy()[0, 0] for value in binding.get_outputs())
        return logits, state


class Assistant(Drawing):
    """A drafter at work on one sequence; a `Guesser`.

    Args:
        target: the model that decides, opened with its hidden states.
        vocab_size, sampler: of that model, see `Drawing`.
    """

    def __init__(self, model: AssistantModel, target: OrtModel, *, sampler: Sampler) -> None:
        super().__init__(vocab_size=target.vocab_size, sampler=sampler, where=model.path)
        self.model, self.target = model, target
        self._ids: list[int] = []
        self._sequence: OrtSequence | None = None

    def follow(self, ids: Sequence[int], sequence: OrtSequence) -> None:
        """Guess what comes behind these tokens, of which the sequence has read all but the last when it is asked."""
        self._ids, self._sequence = list(ids), sequence

    def prepare(self) -> None:
        """Nothing is to be read."""

    def append(self, token: int) -> None:
        """A token more."""
        self._ids.append(token)

    def guess(self, most: int) -> Guess:
        """What the drafter would say."""
        sequence = self._sequence
        positions = 0 if sequence is None else sequence.length
        state = None if sequence is None else sequence.state(positions - 1)
        most = min(most, self._ahead)
        if sequence is None or state is None or most < 1 or positions >= self.model.context_length:
            return Guess(())
        tokens: list[int] = []
        drawn_from: list[Chances] = []
        newest = self._ids[positions]
        while True:
            entering = np.concatenate([self.target.embedded(newest), state])
            row, state = self.model.step(entering, sequence, positions)
            newest, sure = self._chosen(np.array(row), drawn_from)
            tokens.append(newest)
            if len(tokens) == most or sure < draft.LEAST_SURE or newest in self.target.stop_ids:
                return Guess(tokens, drawn_from or None)


def sources_of(drafter: Engine, target: Engine) -> dict[str, int]:
    """The layers of a model whose caches its drafter reads, by kind: the last of each with keys of its own.

    Raises:
        UsageError: the drafter is another model's, naming all that differs.
    """
    ours, theirs = drafter.manifest.model, target.manifest.model
    assert ours.drafting is not None
    problems = []
    if ours.drafting.backbone != theirs.hidden_size:
        problems.append(f"hidden states of {theirs.hidden_size} channels; the drafter reads {ours.drafting.backbone}")
    if ours.vocab_size != theirs.vocab_size:
        problems.append(f"a vocabulary of {theirs.vocab_size}; the drafter has {ours.vocab_size}")
    said, found = ours.model_extra or {}, theirs.model_extra or {}
    kinds = list(found.get("layer_types", ()))
    ports = {port.name: port.shape for graph in target.manifest.contract.graphs.values() for port in graph.inputs}
    wanted = {port.name: port.shape for graph in drafter.manifest.contract.graphs.values() for port in graph.inputs}
    sources: dict[str, int] = {}
    for name, shape in wanted.items():
        if not name.startswith(SHARED_KV) or not name.endswith(".key"):
            continue
        kind = name.split(".")[1]
        own = [i for i, one in enumerate(kinds) if one == kind and f"past_key_values.{i}.key" in ports]
        if not own:
            problems.append(f"no layer of {kind} with keys of its own")
            continue
        sources[kind] = own[-1]
        cache = ports[f"past_key_values.{own[-1]}.key"]
        if (cache[1], cache[3]) != (shape[1], shape[3]):
            problems.append(f"{kind}: {cache[1]} key heads of {cache[3]}; the drafter reads {shape[1]} of {shape[3]}")
        problems += _other(f"rotary embedding of {kind}", *((one.get("rope") or {}).get(kind) for one in (found, said)))
    problems += _other("window", found.get("sliding_window"), said.get("sliding_window"))
    if problems:
        raise UsageError(
            "the drafter guesses for another model",
            where=f"{drafter.path} (--draft)",
            problems=[f"{target.path} has {one}" for one in problems],
            expected="the drafter of this model, or a smaller Gemma with its tokenizer",
            next_step="compile the assistant that was published beside the model, or leave --draft out",
        )
    if (drafter.path / TOKENIZER).is_file():
        check_draft(drafter, target)
    return sources


def _other(what: str, ours: Any, theirs: Any) -> list[str]:
    return [] if ours == theirs else [f"{what} {ours}; the drafter has {theirs}"]


def refuse_caches(target: OrtModel) -> None:
    """Refuse caches that hold a window alone, and those of codes: a drafter takes floats from their front.

    Raises:
        UsageError: there are such.
    """
    if any(value.name.startswith(CACHES) and value.type == "tensor(int8)" for value in target.session.get_inputs()):
        raise UsageError(
            "a drafter reads keys and values as floats, and this artifact keeps codes (frontend.quantize.type: +kv8)",
            where=str(target.path),
            expected="an artifact with whole caches of floats",
            next_step="compile it without +kv8, or leave --draft out",
        )
    if target.windows:
        raise UsageError(
            "a drafter reads keys and values of all positions, and this artifact keeps those of a window "
            "(backend.compile.cache: window)",
            where=str(target.path),
            expected="an artifact with whole caches",
            next_step="compile it with backend.compile.cache: full, or leave --draft out",
        )
