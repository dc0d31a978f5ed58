"""Names in a file that are not the model's, and what transformers makes of them.

A base model is saved without the prefix `model.`, a tied one perhaps with its head in the place of its table, and a
model that reads images as well has its language model under a prefix of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from gemma_deploy.names import EMBEDDING_WEIGHT, HEAD_WEIGHT

PREFIX = "model."
# The text model inside multimodal Gemmas, as transformers has named it: prefix there -> prefix here.
INSIDE = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
    ("language_model.", "model."),  # a model without a head
)
# Parts of multimodal Gemmas that read images and sounds. A text model has no use for them.
TOWERS = (
    "vision_tower",
    "multi_modal_projector",
    "audio_tower",
    "embed_vision",
    "embed_audio",
    "vision_model",
    "vision_embedder",
)
# A classifier's head is no part of a language model; staging carries it because it links the whole file.
CLASSIFIER_HEAD = "score.weight"


@dataclass(frozen=True)
class FileNames:
    """What a file's tensors are here.

    Args:
        sources: name here -> name in the file.
        extras: names in the file that nothing here knows.
        twice: pairs of names in the file that mean one tensor.
        notes: what is read in another way than it is written, and what is not read at all.
    """

    sources: dict[str, str]
    extras: tuple[str, ...]
    twice: tuple[str, ...]
    notes: tuple[str, ...]


def name_tensors(
    stored: Collection[str], expected: Collection[str], *, tied: bool, unread: Collection[str] = ()
) -> FileNames:
    """Find each tensor of a model in a file.

    Args:
        stored: names in the file; expected: names of the model.
        unread: names that a file of the model may hold as well.
        tied: whether the LM head is the token table. A head beside the table is left in `sources` for the caller.
    """
    known = {*expected, HEAD_WEIGHT} if tied else set(expected)
    sources = {name: name for name in stored if name in expected}
    notes, extras, twice = [], [], []
    towers: Counter[str] = Counter()
    shared: list[str] = []
    bare = within = 0
    for name in stored:
        if name in sources:
            continue
        nested = next((here for here in inside(name) if here in known), None)
        here = nested or next((here for here in (PREFIX + name, name) if here in known), None)
        if here is not None:
            within += nested is not None
            bare += nested is None and here != name
            if here in sources:
                twice.append(f"{name} and {sources[here]}")
            sources.setdefault(here, name)
        elif name.endswith(".rotary_emb.inv_freq"):
            notes.append(f"{name} is ignored: the frequencies follow from the config")
        elif name == CLASSIFIER_HEAD:
            notes.append(f"{name} is ignored: the classification head is no part of the language model")
        elif {name, PREFIX + name, *inside(name)} & set(unread):
            shared.append(name)
        elif (tower := name.removeprefix(PREFIX).partition(".")[0]) in TOWERS:
            towers[tower] += 1
        else:
            extras.append(name)
    if bare:
        notes.append(f"{bare} tensors are named without the prefix {PREFIX}, as a base model's are")
    if within:
        notes.append(f"{within} tensors are those of the language model in a model that reads images as well")
    if tied and EMBEDDING_WEIGHT not in sources and HEAD_WEIGHT in sources:
        sources[EMBEDDING_WEIGHT] = sources.pop(HEAD_WEIGHT)
        notes.append(f"{HEAD_WEIGHT} is the token table as well: the two are tied, and the file has it alone")
    if shared:
        notes.append(
            f"{len(shared)} tensor(s) of layers that share keys and values of earlier ones are ignored: "
            + ", ".join(shared)
        )
    for tower, count in towers.items():
        notes.append(f"{count} tensor(s) of {tower} are ignored: the text model does not read them")
    return FileNames(sources, tuple(extras), tuple(twice), tuple(notes))


def is_inside(name: str) -> bool:
    """Whether a name is that of a language model in a multimodal Gemma."""
    return name.startswith(tuple(there for there, _ in INSIDE))


def inside(name: str) -> list[str]:
    """What a name may be here, were it one of a language model in a multimodal Gemma."""
    return [here + name.removeprefix(there) for there, here in INSIDE if name.startswith(there)]
