"""The files of source_code/ as Python modules, and what a generation's row names in them. Imports them when asked."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from gemma_deploy.checkpoint import ModelConfig, WeightSource
from gemma_deploy.errors import CheckpointError
from gemma_deploy.names import CONFIG
from gemma_deploy.paths import source_code_dir

if TYPE_CHECKING:
    from torch import nn

PACKAGE = "gemma_deploy_source_code"


def patched_module(name: str) -> types.ModuleType:
    """Import one file of source_code/ under a package of its own, the way transformers would load it.

    Raises:
        ImportError: the file does not import with the installed transformers.
    """
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(source_code_dir())]
        sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.{name}")


def patched_config(config: ModelConfig, **changes: Any) -> Any:
    """The config object of the patched classes, with eager attention.

    Args:
        changes: keys to set. `layer_types` is left out where the generation's config class has none.
    """
    row = config.architecture.patched
    raw = {key: value for key, value in config.raw.items() if key != "auto_map"}
    if not row.layer_types:
        changes.pop("layer_types", None)
    made = configured(getattr(patched_module(row.configuration), row.config_class), {**raw, **changes})
    made._attn_implementation = "eager"
    return made


def stock_config(config: ModelConfig, **changes: Any) -> Any:
    """The config object of transformers' own class, with eager attention and experts.

    Args:
        changes: keys to set.
    """
    from transformers import AutoConfig

    raw = {key: value for key, value in config.raw.items() if key not in ("auto_map", "model_type")}
    made = configured(AutoConfig.for_model, {"model_type": config.architecture.transformers_type, **raw, **changes})
    made._attn_implementation = made._experts_implementation = "eager"
    return made


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter into a model, by its path."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, parameter)


def fill_numbers(model: nn.Module, source: WeightSource) -> None:
    """Give the numbers of layers, which both classes have as buffers, a checkpoint's values in float32."""
    import torch

    for layer in source.config.layers:
        if layer.scalar is not None:
            value = torch.from_numpy(source.rows(f"{layer.prefix}{layer.scalar}", 0, 1))
            model.get_submodule(layer.prefix.removesuffix(".")).register_buffer(layer.scalar, value)


def configured(kind: Callable[..., Any], raw: Mapping[str, Any]) -> Any:
    """A config object of transformers, made from the keys of a config.json.

    Args:
        kind: the class, or a function that makes one.
        raw: the keys; those that `ModelConfig` does not look at have been checked by nobody yet.

    Raises:
        CheckpointError: transformers refuses one of them.
    """
    try:
        made = kind(**raw)
        made.to_dict()  # models ask for it when they are built, and it has checks of its own
        return made
    except Exception as error:  # its checks raise errors of several kinds
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"transformers refuses the model's config: {said[:300]}",
            where=CONFIG,
            expected="a config that transformers' AutoConfig reads",
            next_step="take config.json from the place the weights came from",
        ) from error


def patched_stack(config: ModelConfig, **changes: Any) -> nn.Module:
    """The decoder stack without a head on the meta device, in evaluation mode; see `patched_config`."""
    return _on_meta(config, config.architecture.patched.stack, changes).eval()


def patched_causal(config: ModelConfig, **changes: Any) -> nn.Module:
    """The causal LM on the meta device; of an encoder that has no such class, its stack as `model`, without a head.

    See `patched_config`.
    """
    row = config.architecture.patched
    if row.causal is not None:
        return _on_meta(config, row.causal, changes)
    from torch import nn

    whole: Any = nn.Module()
    whole.model, whole.lm_head = _on_meta(config, row.stack, changes), None
    whole.config = whole.model.config
    headless: nn.Module = whole
    return headless


def one_layer_of_each_template(config: ModelConfig) -> dict[str, Any]:
    """Changes for the two above: `config.templates` in their order are all the layers there are."""
    table = config.per_layer
    vectors = {} if table is None else {"per_layer_vectors": table.layers}  # those of all layers of the model
    return {**config.architecture.part_keys(config.templates), **vectors}


def _on_meta(config: ModelConfig, name: str, changes: dict[str, Any]) -> nn.Module:
    import torch

    made = patched_config(config, **changes)
    model_class = getattr(patched_module(config.architecture.patched.modeling), name)
    with torch.device("meta"):
        model: nn.Module = model_class(made)
    return model
