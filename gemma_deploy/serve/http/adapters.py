"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them: adapters come and go while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gemma_deploy.artifact.adapters import NAME, slots_of
from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.serve.http.errors import ApiError, told, words_of, wrong
from gemma_deploy.serve.http.fields import Fields
from gemma_deploy.serve.http.served import Served

SWITCH = "--allow-adapters"


class UnloadFields(Fields):
    """`/v1/unload_lora_adapter`; `model` where several artifacts are served."""

    lora_name: str


class LoadFields(UnloadFields):
    """`/v1/load_lora_adapter`."""

    lora_path: str
    load_inplace: bool | None = None


class Loading:
    """See the module.

    Args:
        folder: below which adapters may be loaded, None: nobody may load one. Links are followed, and may not leave it.
        names: of all models.
    """

    def __init__(self, folder: Path | None, names: Collection[str]) -> None:
        self._folder, self._names = folder.resolve() if folder is not None else None, names

    async def load(self, served: Served, fields: LoadFields) -> Mapping[str, Any]:
        """Load an adapter: the card of what it is asked for by.

        Raises:
            ApiError: nobody may, the name is taken, the path leads elsewhere, or there is no adapter of this model.
        """
        folder, name = self._allowed(), fields.lora_name
        self._check_name(served, name)
        try:
            slots_of(served.engine.artifact)
        except UsageError as error:
            raise told(error, "model") from None
        async with served.changing:
            old = served.adapters.get(name)
            if old is not None and not fields.load_inplace:
                raise wrong("lora_name", f"{name} is loaded already: unload it first, or send load_inplace: true")
            try:
                path = await asyncio.to_thread(_within, folder, fields.lora_path)
                prepared = await asyncio.to_thread(served.worker.prepare, path)
            except DeployError as error:
                raise wrong("lora_path", words_of(error)) from None
            try:
                number = await asyncio.wrap_future(served.worker.load(prepared))
            except UsageError as error:
                raise told(error, "lora_name") from None
            made = served.add_adapter(name, number)
            if old is not None:
                await asyncio.wrap_future(served.worker.unload(old.number))
        return made.card(made.names[0])

    async def unload(self, served: Served, fields: UnloadFields) -> Mapping[str, Any]:
        """Unload an adapter: requests with it that were taken are answered, others are not.

        Raises:
            ApiError: nobody may, or it is not loaded.
        """
        self._allowed()
        async with served.changing:
            gone = served.adapters.pop(fields.lora_name, None)
            if gone is None:
                message = f"no adapter {fields.lora_name[:80]!r} of {served.names[0]} is loaded"
                raise ApiError(404, message, param="lora_name", code="model_not_found")
            await asyncio.wrap_future(served.worker.unload(gone.number))
        return {"id": gone.names[0], "object": "model", "deleted": True}

    def _allowed(self) -> Path:
        if self._folder is None:
            raise ApiError(
                403, f"adapters are not loaded by request: start the server with {SWITCH} DIR", code="not_allowed"
            )
        return self._folder

    def _check_name(self, served: Served, name: str) -> None:
        try:
            check_name(name, served.names, self._names)
        except UsageError as error:
            raise told(error, "lora_name") from None


def check_name(name: str, own: Collection[str], every: Collection[str]) -> None:
    """See that an adapter may be called so.

    Args:
        own: names of its model; every: names of all models.

    Raises:
        UsageError: it is no name, or a model has the one that it would be asked for by.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is no name of an adapter",
            expected="letters, digits, dots, dashes and underscores, 100 at most, the first a letter or digit",
            next_step="give another name",
        )
    taken = [full for one in own if (full := f"{one}:{name}") in every]
    if taken:
        raise UsageError(f"a model is called {taken[0]} already", next_step="give the adapter another name")


def _within(folder: Path, given: str) -> Path:
    """A directory below `folder` whose files lie there too.

    Raises:
        UsageError: it is none; what lies elsewhere is not told from what is nowhere.
    """
    refusal = UsageError(
        "leads to no directory from which adapters may be loaded",
        expected=f"one below that of {SWITCH}, or its path from there",
        next_step=f"move it there, or start the server with another {SWITCH}",
    )
    try:
        found = (folder / given).resolve()
        if not found.is_relative_to(folder) or not found.is_dir():
            raise refusal
        if any(not one.resolve().is_relative_to(folder) for one in found.iterdir()):
            raise refusal
    except (OSError, ValueError, RuntimeError):  # a name that no file has, what may not be read, links in a circle
        raise refusal from None
    return found
