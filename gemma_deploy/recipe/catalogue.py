"""The recipes that come with the program: found by their names wherever one is, listed with what each is good for.

The first line of a shipped recipe is `# Goal: ...`; everything else that is listed is read from its keys.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gemma_deploy import reading
from gemma_deploy.errors import RecipeError
from gemma_deploy.paths import build_in_dir

GOAL = "# Goal: "
FOLDER = "build_in"
SUFFIXES = (".yaml", ".yml")
# Names that recipes had before -> their names now.
FORMER_NAMES = {
    "hf_gemma_fp32": "accelerator-fp32",
    "hf_gemma_bf16": "accelerator-bf16",
    "hf_gemma_fp16": "accelerator-fp16",
    "hf_gemma_int8": "accelerator-int8",
    "hf_gemma2_int8": "accelerator-int8-gemma2",
    "hf_gemma3_fp32": "accelerator-fp32-gemma3",
    "hf_gemma3_fp16": "accelerator-fp16-gemma3",
    "hf_gemma3_int8": "accelerator-int8-gemma3",
    "hf_gemma3_int8_gptq": "accelerator-best-int8-gemma3",
    "hf_gemma3_int8_kv8": "accelerator-long-context-int8-gemma3",
    "ort_gemma_int8": "cpu-int8",
    "ort_gemma3_int8_gptq": "cpu-best-int8",
    "ort_gemma3_int8_fast": "cpu-long-prompts-w8a8",
    "ort_gemma3_int4": "cpu-small-int4",
}


@dataclass(frozen=True)
class Shipped:
    """A recipe that comes with the program.

    Args:
        name: as a command takes it, `cpu-int8` or `vendor/hf_gemma_int8`; file: where it lies.
        goal: what it is good for, one sentence.
        former: the name it had before, "" where it had none.
    """

    name: str
    file: Path
    goal: str
    former: str = ""


def shipped_recipes() -> list[Shipped]:
    """All of them, by name."""
    folder = build_in_dir()
    former = {new: old for old, new in FORMER_NAMES.items()}
    found = []
    for file in sorted(folder.rglob("*.yaml")):
        name = file.relative_to(folder).with_suffix("").as_posix()
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        found.append(Shipped(name, file, first.removeprefix(GOAL), former.get(name, "")))
    return found


def find_recipe(asked: str | os.PathLike[str]) -> Path:
    """The file that is meant: a path, or the name of a shipped recipe, with or without `build_in/` and `.yaml`.

    A file wins over a shipped recipe where a path or a suffix is given; a bare word is the shipped recipe's.

    Raises:
        RecipeError: there is no such file, and no shipped recipe of that name; the nearest names are told.
    """
    text = os.fspath(asked)
    shipped = _named(text)
    is_bare = not Path(text).suffix and os.sep not in text
    if shipped is not None and (is_bare or not reading.exists(text)):
        return shipped
    if shipped is None and reading.why_absent(text) == reading.NOWHERE:
        raise _unknown(text)
    return Path(text)


def _named(text: str) -> Path | None:
    """The shipped recipe of a name, present or former; `-` and `_` are the same, and so are large letters and small."""
    words = _word(text)
    if words is None:
        return None
    for recipe in shipped_recipes():
        if words in (_folded(recipe.name), _folded(recipe.former)):
            return recipe.file
    return None


def _word(text: str) -> str | None:
    """What `text` names in the folder of shipped recipes, folded; None where it leads elsewhere."""
    folder = PurePosixPath(build_in_dir())
    path, whole = PurePosixPath(text), PurePosixPath(os.path.abspath(text))
    if whole.is_relative_to(folder):  # a former name in the folder of a checkout, say
        path = whole.relative_to(folder)
    elif path.is_absolute() or ".." in path.parts:
        return None
    elif path.parts[:1] == (FOLDER,):
        path = path.relative_to(FOLDER)
    return _folded(str(path.with_suffix("") if path.suffix in SUFFIXES else path))


def _folded(name: str) -> str:
    return re.sub(r"[-_]+", "-", name.lower())


def _unknown(text: str) -> RecipeError:
    names = {_folded(name): one.name for one in shipped_recipes() for name in (one.name, one.former) if name}
    word = _folded(PurePosixPath(text).name.removesuffix(".yaml").removesuffix(".yml"))
    near = [name for folded, name in names.items() if word and word in folded]
    near += [names[one] for one in difflib.get_close_matches(word, names, n=6, cutoff=0.5)]
    near = list(dict.fromkeys(near))[:3]
    return RecipeError(
        "there is no such file, and no built-in recipe of that name",
        where=text,
        expected="the path of a YAML recipe, or a name that `gemma-deploy recipes` lists",
        next_step=f"did you mean {' or '.join(near)}?" if near else "choose one that `gemma-deploy recipes` lists",
    )
