"""What a recipe means before it is validated: empty sections, second spellings, defaults that depend on other keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from gemma_deploy.calibration.mix import read_mix
from gemma_deploy.recipe import explain, sections
from gemma_deploy.recipe.document import Document

# Second spellings of one key, both found in public recipes: (spelling, its name here).
_SPELLINGS = (
    (("frontend", "quantize", "calib_args", "damp_percent"), "percdamp"),
    (("frontend", "quantize", "calib_args", "desc_act"), "act_order"),
)


def normalise(cls: type[BaseModel], document: Document) -> None:
    """Empty sections, second spellings, and defaults that depend on other keys."""
    _drop_empty_sections(cls, document.values)
    _keep_expanded_text(cls, document)
    for path, name in _SPELLINGS:
        section, target = document.get(path[:-1]), (*path[:-1], name)
        if not isinstance(section, dict) or path[-1] not in section:
            continue
        if name in section:
            document.problems.append((path, f"is a second spelling of {name}, which is given as well: keep one"))
            section.pop(path[-1])
            continue
        section[name] = section.pop(str(path[-1]))
        document.places[target] = document.place(path)
    frontend = document.values.get("frontend")
    if isinstance(frontend, dict) and "type" not in frontend:
        checkpoint = frontend.get("checkpoint")
        if isinstance(checkpoint, str) and checkpoint.lower().endswith(".gguf"):
            frontend["type"] = "gguf"
    _fit_parity_defaults(document)
    _add_up_windows(document)


def _drop_empty_sections(cls: type[BaseModel], values: dict[str, Any]) -> None:
    """`dataset:` with nothing behind it means the defaults."""
    for name in list(values):
        inner = explain.section_at(cls, (name,))
        is_map = inner is not None or name == "compile"
        if is_map and values[name] is None:
            del values[name]
        elif inner is not None and isinstance(values[name], dict):
            _drop_empty_sections(inner, values[name])


def _keep_expanded_text(cls: type[BaseModel], document: Document) -> None:
    """A value of the environment is text where the schema wants text, also where it looks like a number or null."""
    for path, text in document.expanded.items():
        section = document.get(path[:-1])
        if isinstance(section, dict) and path[-1] in section and explain.wants_text(cls, path):
            section[path[-1]] = text


def _fit_parity_defaults(document: Document) -> None:
    """Short graphs get a short comparison unless the recipe asks for a longer one."""
    lengths = document.get(("frontend", "shape", "input_ids"))
    parity = document.values.get("parity", {})
    match lengths:
        case [[int(prefill)], [int(context)]] if isinstance(parity, dict) and 0 < prefill <= context:
            fields = sections.Parity.model_fields
            fits = {"prompt_tokens": prefill, "decode_tokens": context - prefill}
            for name, room in fits.items():
                if name not in parity and room < fields[name].default:
                    document.values.setdefault("parity", parity)[name] = room


def _add_up_windows(document: Document) -> None:
    """A mix says how many windows it has; nsamples need not repeat it."""
    dataset = document.values.get("dataset")
    if isinstance(dataset, dict) and isinstance(dataset.get("name"), str) and "nsamples" not in dataset:
        windows = read_mix(dataset["name"]).windows
        if windows is not None:
            dataset["nsamples"] = windows
