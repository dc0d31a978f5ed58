"""`Recipe`: what a user asks for, typed and checked, before anything is read or written.

Step 1 of the data path. Knows nothing of checkpoints or graphs. Reading collects every mistake of the file
(YAML, unknown keys, types, contradictions) and raises one `RecipeError`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError

from gemma_deploy import reading
from gemma_deploy.errors import RecipeError
from gemma_deploy.paths import build_in_dir
from gemma_deploy.recipe import document as documents
from gemma_deploy.recipe import explain, rules, sections
from gemma_deploy.recipe.document import Document
from gemma_deploy.recipe.normal import normalise
from gemma_deploy.schemes import QUANTIZERS, Storage, dividing_table, storage_of

# Stand-ins for keys that are missing or wrong, so that the rules about the other keys still run.
_STAND_INS: dict[documents.Path, Any] = {
    ("name",): "unnamed",
    ("frontend", "checkpoint"): "demo",
    ("frontend", "shape", "input_ids"): [[16], [16]],
    ("backend", "dtype"): "fp32",
}
RECIPE_FILE = reading.FileKind(
    error=RecipeError,
    expected="a YAML recipe in UTF-8",
    next_step="give the path of a recipe; build_in/ holds some to start from",
    limit_bytes=4 * documents.MAX_CHARS,
)
# Read where the target is ONNX Runtime.
ORT_KEYS = tuple(f"backend.compile.{key}" for key in ("block", "prefill", "head", "cache", "logits"))
W16KV8, KV8 = "w16kv8", "+kv8"


class Recipe(sections.Section):
    """One compile job.

    Example:
        name: gemma-2b-int8-1024-2048
        frontend:
          checkpoint: ${GEMMA_CHECKPOINT:-demo}
          shape: {input_ids: [[1024], [2048]]}
          quantize: {type: w8a16}
        backend: {dtype: int8}
    """

    name: Annotated[str, Field(min_length=1)]
    frontend: sections.Frontend
    split: sections.Split = sections.Split()
    graph: sections.Graph = sections.Graph()
    dataset: sections.Dataset = sections.Dataset()
    backend: sections.Backend
    parity: sections.Parity = sections.Parity()
    workspace: sections.Workspace = sections.Workspace()

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        *,
        checkpoint: str | None = None,
    ) -> Self:
        """Read a recipe file.

        Args:
            path: the YAML file.
            overrides: `a.b.c=value` strings, the value in YAML; later ones win.
            env: where `${VAR}` is looked up (the process environment by default).
            checkpoint: replaces `frontend.checkpoint` verbatim, and `frontend.type` with what its name says.

        Raises:
            RecipeError: the file cannot be read, or lists everything wrong in it.
        """
        path = _shipped(Path(path))
        text = reading.read_text(path, RECIPE_FILE, pipes=True)
        return cls.from_text(text, overrides, env, checkpoint=checkpoint, where=str(path))

    @classmethod
    def from_text(
        cls,
        text: str,
        overrides: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        *,
        checkpoint: str | None = None,
        where: str = "recipe",
    ) -> Self:
        """Like `load`, from YAML text."""
        document = documents.parse(text, overrides, os.environ if env is None else env)
        if checkpoint is not None:
            _replace_checkpoint(document, checkpoint)
        unreadable = not document.values and document.problems
        recipe = None if unreadable else _build(cls, document)
        if document.problems or recipe is None:
            problems = document.sentences()
            raise RecipeError(
                f"the recipe has {len(problems)} problem{'s' if len(problems) != 1 else ''}",
                where=where,
                problems=problems,
                next_step="correct the lines above; build_in/ holds working recipes",
            )
        return recipe

    @property
    def prefill_length(self) -> int:
        """P: the length prompts are padded to."""
        return self.frontend.shape.input_ids[0][0]

    @property
    def context_length(self) -> int:
        """C: the slots of the KV cache."""
        return self.frontend.shape.input_ids[1][0]

    @property
    def batch(self) -> int:
        """B: sequences computed together."""
        return self.frontend.shape.batch

    @property
    def dynamic(self) -> bool:
        """Whether batch and lengths are free in the graphs."""
        return self.frontend.shape.dynamic

    @property
    def split_points(self) -> tuple[int, ...]:
        """Layers that begin a new stage."""
        return tuple(self.split.points)

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks of every stage (`model_kwargs.tp`)."""
        return self.frontend.model_kwargs.tp

    @property
    def scheme(self) -> str:
        """fp32, fp16, bf16, or the quantize type (int8 alone means w8a16)."""
        if self.frontend.quantize is not None:
            return self.frontend.quantize.type
        return "w8a16" if self.backend.dtype == "int8" else self.backend.dtype

    @property
    def weights(self) -> str:
        """How the parameters are stored, whatever the cache is: the scheme without its `+kv8`.

        The 16 bits of w16kv8 are those of backend.dtype; of int8, which then speaks of the cache alone, float16.
        """
        if self.scheme == W16KV8:
            return "fp16" if self.backend.dtype == "int8" else self.backend.dtype
        return self.scheme.removesuffix(KV8)

    @property
    def sensitivity(self) -> bool:
        """Whether what each layer costs alone is measured: of calibrated weights, unless the recipe says otherwise."""
        section = self.frontend.quantize
        return self.weights in QUANTIZERS and not (section and section.calib_args.sensitivity is False)

    @property
    def onnxruntime(self) -> bool:
        """Whether the artifact is one graph for ONNX Runtime."""
        return self.backend.type == "onnxruntime"

    @property
    def prefill(self) -> str:
        """`backend.compile.prefill` for ONNX Runtime: "fast" are integer products of whole rows, "lean" blocks."""
        return str(self.backend.compile.get("prefill") or ("fast" if self.onnxruntime and self.int8_rows else "lean"))

    @property
    def head(self) -> str:
        """`backend.compile.head` for ONNX Runtime: "whole" rows of the table, or "screened" by half of every code."""
        return str(self.backend.compile.get("head") or "whole")

    @property
    def cache(self) -> str:
        """`backend.compile.cache` for ONNX Runtime: "full", or "window" where sliding layers keep the window alone."""
        return str(self.backend.compile.get("cache") or "full")

    @property
    def logits(self) -> str:
        """`backend.compile.logits` for ONNX Runtime: of the "last" token of a row, or of "all" new ones."""
        return str(self.backend.compile.get("logits") or "last")

    @property
    def int8_rows(self) -> bool:
        """Whether the codes of linears have 8 bits and one scale per row."""
        return self.weights in ("w8a8", "w8a16", "w8a16_gptq") and self.storage_for(0).linears.groupsize is None

    @property
    def int8_weights(self) -> bool:
        """Whether matrices are stored as codes with scales, of 8 bits or 4."""
        return self.weights.startswith("w")

    @property
    def int8_cache(self) -> bool:
        """Whether keys and values are kept as 8-bit codes."""
        return self.scheme == W16KV8 or self.scheme.endswith(KV8)

    def storage_for(self, hidden_size: int) -> Storage:
        """What the matrices of an int8 artifact of a model of this width are stored as."""
        section = self.frontend.quantize
        given = None if section is None else section.calib_args
        groupsize, kept = (None, None) if given is None else (given.groupsize, given.keep_w8)
        table: str | None = None if section is None else section.table
        if table is None and self.onnxruntime:  # its kernels have scales per group in any case
            table = dividing_table(hidden_size)
        return storage_of(self.weights, hidden_size, groupsize, table, kept) if self.int8_weights else Storage()

    def resolved(self) -> dict[str, Any]:
        """The recipe with all defaults, as plain data; `from_text` of its YAML gives an equal recipe."""
        return _dump(self)

    def vendor_keys(self) -> dict[str, Any]:
        """Dotted key -> value of what is carried into the manifest and has no effect here."""
        carried = _vendor(self, "")
        if self.onnxruntime:
            carried = {key: value for key, value in carried.items() if key not in ORT_KEYS}
        quantize = self.frontend.quantize
        looks_at_data = self.weights in QUANTIZERS or self.int8_cache  # rounding to nearest does not
        if quantize is not None:
            for key in ("device", "calib_args"):
                used = looks_at_data and (key == "calib_args" or quantize.device == "cpu")  # calibration runs there
                if key in quantize.model_fields_set and not used:
                    value = getattr(quantize, key)
                    carried[f"frontend.quantize.{key}"] = _dump(value) if isinstance(value, BaseModel) else value
        return dict(sorted(carried.items()))


T = TypeVar("T", bound=Recipe)


def _is_vendor(owner: BaseModel, name: str) -> bool:
    return type(owner).model_fields[name].description == sections.VENDOR


def _dump(section: BaseModel) -> dict[str, Any]:
    """All keys but vendor keys that were not written."""
    dumped: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            inner = _dump(value)
            if inner or name in section.model_fields_set:
                dumped[name] = inner
        elif not _is_vendor(section, name) or name in section.model_fields_set:
            dumped[name] = value
    return dumped


def _vendor(section: BaseModel, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found.update(_vendor(value, f"{prefix}{name}."))
        elif _is_vendor(section, name) and name in section.model_fields_set:
            if name == "compile":
                found.update({f"{prefix}{name}.{key}": inner for key, inner in value.items()})
            else:
                found[f"{prefix}{name}"] = value
    return found


def _replace_checkpoint(document: Document, checkpoint: str) -> None:
    place = f"--checkpoint {checkpoint}"
    kind = "gguf" if checkpoint.lower().endswith(".gguf") else "huggingface"
    documents.set_value(document, ("frontend", "checkpoint"), checkpoint, place)
    documents.set_value(document, ("frontend", "type"), kind, place)


def _build(cls: type[T], document: Document) -> T | None:
    """Validate `document`; problems are added to it, and None comes back only if no recipe could be formed."""
    normalise(cls, document)
    spoiled = {_key(path) for path, _ in document.problems}
    recipe, errors = _validate(cls, document.values)
    for error in errors:
        path = tuple(error["loc"])
        if not any(path[: len(key)] == key for key in spoiled if key):
            document.problems.append((path, explain.sentence(cls, error)))
    bad = spoiled | {_key(tuple(error["loc"])) for error in errors}
    if recipe is None:
        recipe = _without(cls, document, bad)
    if recipe is not None:
        document.problems.extend(rules.contradictions(recipe, bad - {()}))
    return recipe


def _without(cls: type[T], document: Document, bad: set[documents.Path]) -> T | None:
    """What is left of the recipe without the keys in `bad`, so that the rules about the other keys still run."""
    remove = set(bad)
    for _ in range(8):  # a section that lost a required key goes as well, from the inside out
        for path in remove:
            document.remove(path)
        for path, value in _STAND_INS.items():
            if document.get(path) is None:
                _put(document.values, path, value)
        recipe, errors = _validate(cls, document.values)
        if recipe is not None:
            return recipe
        remove = {_key(tuple(error["loc"]))[: -1 if error["type"] == "missing" else None] for error in errors}
    return None


def _validate(cls: type[T], values: dict[str, Any]) -> tuple[T | None, list[Any]]:
    try:
        return cls.model_validate(values), []
    except ValidationError as error:
        return None, list(error.errors(include_url=False))


def _key(path: documents.Path) -> documents.Path:
    """`path` up to the last key before a list index."""
    for depth, part in enumerate(path):
        if isinstance(part, int):
            return path[:depth]
    return path


def _put(values: dict[str, Any], path: documents.Path, value: Any) -> None:
    for part in path[:-1]:
        inner = values.get(str(part))
        if not isinstance(inner, dict):
            inner = values[str(part)] = {}
        values = inner
    values[str(path[-1])] = value


def _shipped(path: Path) -> Path:
    """A name that starts with build_in means the shipped recipe, wherever one is, unless the file is there."""
    if reading.exists(path) or path.is_absolute() or path.parts[:1] != ("build_in",):
        return path
    shipped = build_in_dir().joinpath(*path.parts[1:])
    return shipped if reading.is_file(shipped) else path
