"""The language model of a Gemma that reads images as well: config.json holds its keys in `text_config`.

Published files leave out what is the default of transformers' config class; images are not read here.
"""

from __future__ import annotations

from gemma_deploy.architectures import by_multimodal, model_types, multimodal_types, names
from gemma_deploy.architectures.keys import ConfigKeys
from gemma_deploy.architectures.relatives import not_built
from gemma_deploy.errors import CheckpointError

INNER = "text_config"
# Where text_config does not say them, the model around it does.
SHARED = (
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "quantization_config",
)


def language_model(keys: ConfigKeys) -> ConfigKeys:
    """The keys of a text model: its own, or those of the language model in a multimodal one, defaults filled in.

    Raises:
        CheckpointError: the model, or its language model, is none of Gemma's that are built.
    """
    outer, kind = keys.raw, keys.raw.get("model_type")
    row = by_multimodal(kind)
    if row is not None and row.model_type == kind and INNER not in outer:
        return keys  # as it was read before
    if row is None:
        if (relative := not_built(kind)) is not None:
            raise CheckpointError(
                relative,
                where=keys.where,
                expected="one of " + ", ".join((*model_types(), *multimodal_types())),
                next_step=f"pass a checkpoint of {names()}",
            )
        if INNER in outer:
            raise CheckpointError(
                f"model_type {kind!r} has a {INNER}: a model of text and images that is not built",
                where=keys.where,
                expected=f"no {INNER}, or a model_type among {', '.join(multimodal_types())}",
                next_step="pass a text checkpoint, or a multimodal Gemma of these",
            )
        return keys
    inner = outer.get(INNER)
    inner = {} if inner is None else inner
    wanted = row.text_type or row.model_type
    said = inner.get("model_type", wanted) if isinstance(inner, dict) else None
    if said != wanted:
        raise CheckpointError(
            f"{INNER} is not the config of a {row.name}",
            where=keys.where,
            expected=f"an object whose model_type is {wanted}",
            next_step="take config.json from the place the weights came from",
        )
    around = {key: outer[key] for key in (*SHARED, *row.around) if key in outer}
    own = {
        "model_type": row.model_type,
        "architectures": [row.causal_class],
        "tie_word_embeddings": outer.get("tie_word_embeddings", True),  # transformers asks the model around it
    }
    return ConfigKeys({**row.text_defaults, **around, **inner, **own}, f"{keys.where}: {INNER}")
