"""Artifacts of `backend.type: onnxruntime` in onnxruntime-genai, which has the model, the cache and the sampler.

The tokenizer is the artifact's own (tokenizer.py): genai's puts no BOS in front of a text. genai holds Python's lock
while it computes, so Ctrl-C is answered after a prompt, or between two tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from gemma_deploy import extras
from gemma_deploy.artifact.adapters import KeptAdapter
from gemma_deploy.backends.genai_config import CONFIG_FILE, read_genai_config
from gemma_deploy.backends.keeping import adapter_named
from gemma_deploy.backends.onnxruntime.adapters import values_of
from gemma_deploy.backends.onnxruntime.looked_up import leave_tables
from gemma_deploy.errors import NO_MEMORY, ArtifactError, DeployError, UsageError
from gemma_deploy.graph.contract import AdapterSlots
from gemma_deploy.names import PARAMS
from gemma_deploy.runtime.engine import Session
from gemma_deploy.runtime.generate import GenerationStats, check_context
from gemma_deploy.runtime.limits import REBUILD, check_tokens
from gemma_deploy.runtime.sampling import Sampling
from gemma_deploy.runtime.session import VERIFY
from gemma_deploy.text import Tokenizer

INSTALL = 'pip install "gemma-deploy[genai]"'
LARGEST_SEED = 2**31 - 1  # genai's is an int


class GenaiModel:
    """A model that genai has opened; sessions on it share its weights.

    Args:
        artifact_dir: directory with genai_config.json, the graph it names and params.safetensors.
        threads: of one operator; 0 for as many as there are cores.
        slots: what the graph takes of an adapter; None: nothing.

    Attributes:
        context_length: positions there are, prompt and answer together.
        window: positions that some caches must have, however few tokens there will be; 0 where none holds a window.
        stop_ids: tokens that end a text.
        load_seconds: what opening it took.

    Raises:
        UsageError: onnxruntime-genai is not installed.
        ArtifactError: a file is missing or damaged, or genai refuses the model.
    """

    def __init__(self, artifact_dir: str | Path, threads: int = 0, slots: AdapterSlots | None = None) -> None:
        self.path, self.slots = Path(artifact_dir), slots
        require_genai(str(self.path))
        import onnxruntime_genai as og

        model = read_genai_config(self.path / CONFIG_FILE).model
        self.context_length, self.vocab_size = model.context_length, model.vocab_size
        self.window = model.decoder.sliding_window.window_size if model.decoder.sliding_window is not None else 0
        stops = model.eos_token_id
        self.stop_ids = frozenset(stops if isinstance(stops, list) else [stops])
        for name in (model.decoder.filename, PARAMS):
            if not (self.path / name).is_file():
                raise ArtifactError("is missing", where=str(self.path / name), next_step=REBUILD)
        started = time.perf_counter()
        try:
            config = og.Config(str(self.path))
            options = {"intra_op_num_threads": threads, "enable_mem_pattern": False}  # see `open_graph`, `lean`
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model = og.Model(config)
        except Exception as error:  # genai's own are RuntimeErrors, those of its JSON reader are not
            reason = str(error).splitlines()[0]
            raise ArtifactError(
                f"onnxruntime-genai refuses it: {reason}",
                where=str(self.path),
                next_step="install the genai package of a GPU it has (onnxruntime-genai-cuda), or compile for a CPU "
                "(backend.dtype int8 or fp32)"
                if "interface not available" in reason
                else "run `gemma-deploy verify` on the artifact, then compile it again",
            ) from error
        self._adapters: Any = None
        self._loaded: set[str] = set()
        self.load_seconds = time.perf_counter() - started

    def load_adapter(self, kept: KeptAdapter) -> None:
        """Let genai load a kept adapter, once.

        Raises:
            ArtifactError: it has changed since it was made, or does not fit; genai refuses it.
        """
        if kept.name in self._loaded:
            return
        import onnxruntime_genai as og

        values_of(kept, self.slots)  # genai itself says what is wrong when it computes
        if self._adapters is None:
            self._adapters = og.Adapters(self._model)
        with _explained(kept.file):
            self._adapters.load(str(kept.file), kept.name)
        self._loaded.add(kept.name)

    def unload_adapter(self, kept: KeptAdapter) -> None:
        """Have genai forget a kept adapter, where it has it; no generator may use it."""
        if kept.name in self._loaded:
            with _explained(kept.file):
                self._adapters.unload(kept.name)
            self._loaded.remove(kept.name)

    def generator(
        self, sampling: Sampling, max_length: int, min_length: int = 0, *, adapter: KeptAdapter | None = None
    ) -> Any:
        """A generator of genai for one sequence of up to `max_length` tokens.

        Args:
            min_length: no stop token is chosen before.
            adapter: what it is computed with; it is loaded where it is not yet.
        """
        import onnxruntime_genai as og

        options: dict[str, Any] = {"max_length": max_length, "min_length": min_length, "do_sample": False}
        if sampling.temperature > 0:
            options["do_sample"] = True
            options["temperature"], options["top_p"] = sampling.temperature, sampling.top_p
            options["top_k"] = min(sampling.top_k, self.vocab_size)
            if sampling.seed is not None:
                options["random_seed"] = _small_seed(sampling.seed)
        with _explained(self.path):
            parameters = og.GeneratorParams(self._model)
            parameters.set_search_options(**options)
            generator = og.Generator(self._model, parameters)
        if adapter is not None:
            self.load_adapter(adapter)
            with _explained(adapter.file):
                generator.set_active_adapter(self._adapters, adapter.name)
        return generator


class GenaiSession(Session):
    """One sequence in genai's cache: every reply goes on where the last one ended.

    Args:
        sampling: greedy by default.
        max_length: tokens there may be in all; the model's context by default. The cache is made for as many, and for
            a window of the model where its caches hold that alone.
        min_length: no stop token is chosen before.
        adapters: those that may be used, by name.
    """

    def __init__(
        self,
        model: GenaiModel,
        tokenizer: Tokenizer,
        sampling: Sampling | None = None,
        *,
        max_length: int | None = None,
        min_length: int = 0,
        adapters: Mapping[str, KeptAdapter] = MappingProxyType({}),
    ) -> None:
        super().__init__(tokenizer, model.path, model.stop_ids)
        self.model, self._adapters = model, adapters
        self.sampling = sampling if sampling is not None else Sampling()
        self.max_length = min(max(max_length or model.context_length, model.window), model.context_length)
        self.min_length = min_length
        self.reset()

    def reset(self) -> None:
        """See `Session`."""
        self._before: list[int] = []  # tokens of the sequence that this generator has yet to read
        self._begin()

    def _begin(self) -> None:
        """A generator that has read nothing, with the adapter that is used."""
        kept = None if self._adapter is None else self._adapters[self._adapter]
        self._generator = self.model.generator(self.sampling, self.max_length, self.min_length, adapter=kept)

    def _change_adapter(self, adapter: str | None) -> None:
        """An active adapter of genai's generator cannot be taken back, so there is a new one."""
        if adapter is not None:
            self.model.load_adapter(adapter_named(adapter, self._adapters, self.path))
        self.cancel()
        self._before, self._adapter = self.ids, adapter
        self._begin()

    @property
    def ids(self) -> list[int]:
        """See `Session`."""
        if not self._generator.token_count():
            return list(self._before)
        return [int(token) for token in self._generator.get_sequence(0)]

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """See `Session`."""
        self._admitted(ids)
        self._append(ids)
        with _explained(self.path):
            return np.array(self._generator.get_logits()[0, -1], np.float32)

    def _admit(self, ids: list[int]) -> int:
        before = self._generator.token_count() or len(self._before)
        check_context(len(ids), self.model.context_length, str(self.path), before=before)
        check_tokens(ids, self.model.vocab_size, "prompt")
        return len(ids)

    def _full(self) -> int | None:
        return self.max_length if self._generator.is_done() else None

    def _append(self, ids: Sequence[int]) -> None:
        generator = self._generator
        with _explained(self.path):
            if generator.token_count():
                # genai may have chosen the last token but not read it: without this it never would, nor shift what
                # follows. Rewinding to read it again is no way: caches of a window do not give up what they have read.
                generator.get_logits()
            else:
                ids, self._before = [*self._before, *ids], []
            generator.append_tokens(np.asarray(ids, np.int32))
        leave_tables(self.path, len(ids))

    def _steps(self, ids: list[int], stats: GenerationStats) -> Iterator[Sequence[int]]:
        generator = self._generator
        self._append(ids)
        while True:
            with _explained(self.path):
                _refuse_overflow(generator, self.path)
                generator.generate_next_token()
            yield [int(generator.get_next_tokens()[0])]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say what genai refuses to do with an artifact; it has one kind of error for all that can be."""
    try:
        yield
    except RuntimeError as error:
        if NO_MEMORY.search(str(error)):
            raise
        raise ArtifactError(
            f"onnxruntime-genai refuses it: {' '.join(str(error).split())[:300]}", where=str(path), next_step=VERIFY
        ) from error


def genai_installed() -> bool:
    """Whether the package is there; it is not imported."""
    return extras.installed("genai")


def require_genai(where: str) -> None:
    """Refuse when the package is not there.

    Raises:
        UsageError: it is not installed.
    """
    if not genai_installed():
        raise UsageError("onnxruntime-genai is not installed here", where=where, next_step=INSTALL)


def _refuse_overflow(generator: Any, where: Path) -> None:
    """See to it that NaN is not taken for an answer, as genai does. Before every token: 0.2 ms with 262,144 logits.

    Raises:
        DeployError: the logits are NaN or infinite.
    """
    top = float(generator.get_logits().max())
    if not np.isfinite(top):
        raise DeployError(
            f"the model gave {top} as its largest logit after {generator.token_count()} tokens",
            where=str(where),
            next_step="run `gemma-deploy parity` on the artifact",
        )


def _small_seed(seed: int) -> int:
    if seed > LARGEST_SEED:
        raise UsageError(
            f"seed {seed} is too large",
            expected=f"0 to {LARGEST_SEED} for artifacts of onnxruntime-genai",
            next_step="give a smaller --seed",
        )
    return seed
