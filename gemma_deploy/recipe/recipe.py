"""`Recipe`: what a user asks for, typed and checked, before anything is read or written.

Knows nothing of checkpoints or graphs. Reading collects every mistake of the file (YAML, unknown keys, types,
contradictions) and raises one `RecipeError`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from gemma_deploy import reading
from gemma_deploy.backends import backend
from gemma_deploy.backends.spec import BuildSpec
from gemma_deploy.checkpoint.adapters.merging import AdapterRef, adapter_refs
from gemma_deploy.errors import RecipeError
from gemma_deploy.recipe import document as documents
from gemma_deploy.recipe import sections, validation
from gemma_deploy.recipe.catalogue import find_recipe
from gemma_deploy.recipe.sections import RecipeSections
from gemma_deploy.recipe.spec import scheme_of, spec_of
from gemma_deploy.schemes import Scheme

RECIPE_FILE = reading.FileKind(
    error=RecipeError,
    expected="a YAML recipe in UTF-8",
    next_step="give the path of a recipe, or a name that `gemma-deploy recipes` lists",
    limit_bytes=4 * documents.MAX_CHARS,
)


class Recipe(RecipeSections):
    """One compile job.

    Example:
        name: gemma-2b-int8-1024-2048
        frontend:
          checkpoint: ${GEMMA_CHECKPOINT:-demo}
          shape: {input_ids: [[1024], [2048]]}
          quantize: {type: w8a16}
        backend: {dtype: int8}
    """

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        *,
        checkpoint: str | None = None,
        adapters: Sequence[AdapterRef] = (),
    ) -> Self:
        """Read a recipe file.

        Args:
            path: the YAML file, or the name of a shipped recipe (catalogue.py).
            overrides: `a.b.c=value` strings, the value in YAML; later ones win.
            env: where `${VAR}` is looked up (the process environment by default).
            checkpoint: replaces `frontend.checkpoint` verbatim, and `frontend.type` with what its name says.
            adapters: replace `frontend.adapter`.

        Raises:
            RecipeError: the file cannot be read, or lists everything wrong in it.
        """
        path = find_recipe(path)
        text = reading.read_text(path, RECIPE_FILE, pipes=True)
        return cls.from_text(text, overrides, env, checkpoint=checkpoint, adapters=adapters, where=str(path))

    @classmethod
    def from_text(
        cls,
        text: str,
        overrides: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        *,
        checkpoint: str | None = None,
        adapters: Sequence[AdapterRef] = (),
        where: str = "recipe",
    ) -> Self:
        """Like `load`, from YAML text."""
        document = documents.parse(text, overrides, os.environ if env is None else env)
        if checkpoint is not None:
            validation.replace_checkpoint(document, checkpoint)
        if adapters:
            validation.replace_adapters(document, adapters)
        unreadable = not document.values and document.problems
        recipe = None if unreadable else validation.build(cls, document)
        if document.problems or recipe is None:
            problems = document.sentences()
            raise RecipeError(
                f"the recipe has {len(problems)} problem{'s' if len(problems) != 1 else ''}",
                where=where,
                problems=problems,
                next_step="correct the lines above; `gemma-deploy recipes` lists working ones",
            )
        return recipe

    @property
    def merged_adapters(self) -> tuple[AdapterRef, ...]:
        """What `frontend.adapter` says."""
        return adapter_refs(self.frontend.adapter)

    @property
    def spec(self) -> BuildSpec:
        """The part of the recipe that back ends read."""
        return spec_of(self)

    @property
    def scheme(self) -> Scheme:
        """How weights and cache are kept."""
        return scheme_of(self)

    @property
    def sensitivity(self) -> bool:
        """Whether what each layer costs alone is measured: of calibrated weights, unless the recipe says otherwise."""
        section = self.frontend.quantize
        return self.scheme.calibrated and not (section and section.calib_args.sensitivity is False)

    def resolved(self) -> dict[str, Any]:
        """The recipe with all defaults, as plain data; `from_text` of its YAML gives an equal recipe.

        A section `finetune` is in it where the recipe has one: no artifact depends on it.
        """
        return {key: value for key, value in _dump(self).items() if key != "finetune" or value is not None}

    def vendor_keys(self) -> dict[str, Any]:
        """Dotted key -> value of what is carried into the manifest and has no effect here."""
        carried = _vendor(self, "")
        known = backend(self.backend.type).options.model_fields
        carried |= {f"backend.compile.{key}": value for key, value in self.backend.compile.items() if key not in known}
        quantize = self.frontend.quantize
        quantizer = self.scheme.quantizer  # rounding to nearest looks at no data, and its int8 has no settings
        looks_at_data = self.scheme.calibrates or (quantizer is not None and quantizer.bits == 4)
        if quantize is not None:
            for key in ("device", "calib_args"):
                used = looks_at_data and (key == "calib_args" or quantize.device == "cpu")  # calibration runs there
                if key in quantize.model_fields_set and not used:
                    value = getattr(quantize, key)
                    carried[f"frontend.quantize.{key}"] = _dump(value) if isinstance(value, BaseModel) else value
        return dict(sorted(carried.items()))


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
            found[f"{prefix}{name}"] = value
    return found
