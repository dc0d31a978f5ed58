"""The model that is trained: a class of transformers or of source_code/ with the checkpoint's weights in float32.

Weights are read block by block into the parameters: nothing is in memory twice, and a GGUF file, odd names or shards
in folders need no other way. A token table of 16 bits that is not trained stays as it is (table.py). QLoRA alone goes
through `from_pretrained`, which is where bitsandbytes quantizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.checkpoint import Checkpoint, WeightSource
from gemma_deploy.errors import UsageError
from gemma_deploy.finetune.settings import FinetuneSettings
from gemma_deploy.names import EMBEDDING_WEIGHT, GENERATION_CONFIG, HEAD_WEIGHT
from gemma_deploy.patched import fill_numbers, patched_config, patched_module, set_parameter, stock_config
from gemma_deploy.staging import stage_checkpoint

if TYPE_CHECKING:
    from torch import nn

    from gemma_deploy.artifact.weights import ArtifactWeights

STAGED = "staged"


def load_model(
    settings: FinetuneSettings, checkpoint: Checkpoint, folder: Path, *, base: ArtifactWeights | None = None
) -> Any:
    """A causal LM with eager attention (a soft cap needs it), in training form.

    Args:
        settings: of the run.
        checkpoint: the base.
        folder: where a staged directory may be made, for what only `from_pretrained` can read.
        base: weights of an artifact whose codes are trained on, in the place of the checkpoint's.

    Raises:
        UsageError: bitsandbytes cannot do what is asked for on this machine.
        CheckpointError: the checkpoint's weights cannot be read.
    """
    model = (
        _quantized(settings, checkpoint, folder) if settings.method == "qlora" else _float(settings, checkpoint, base)
    )
    model.name_or_path = str(checkpoint.path.resolve())  # what an adapter names as its base
    model.config.use_cache = False
    return model


def training_class(settings: FinetuneSettings, checkpoint: Checkpoint) -> tuple[type[nn.Module], Any]:
    """The class, and its config object with eager attention."""
    import transformers

    config, row = checkpoint.config, checkpoint.config.architecture
    if settings.model == "patched":
        assert row.patched.causal is not None  # what opens the checkpoint refuses encoders
        return getattr(patched_module(row.patched.modeling), row.patched.causal), patched_config(config)
    return getattr(transformers, row.causal_class), stock_config(config)


def _float(settings: FinetuneSettings, checkpoint: Checkpoint, base: ArtifactWeights | None) -> Any:
    import torch
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    kind, config = training_class(settings, checkpoint)
    config.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        model: Any = kind(config)
    _in_running_order(model, checkpoint)
    if base is not None:
        from gemma_deploy.finetune.codes import use_codes

        use_codes(model, base)
        fill(model, base)
    else:
        if kept_as_stored(settings, checkpoint):
            from gemma_deploy.finetune.table import keep_as_stored

            keep_as_stored(model, checkpoint)
        fill(model, checkpoint)
    if (checkpoint.tokenizer_dir() / GENERATION_CONFIG).is_file() and checkpoint.format != "gguf":
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    elif checkpoint.config.eos_token_ids:
        model.generation_config.eos_token_id = list(checkpoint.config.eos_token_ids)
    return model


def kept_as_stored(settings: FinetuneSettings, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of matrices that stay in the 16 bits they are stored in: the table that is not trained, and its head.

    None where FSDP may want weights of one dtype, and where bitsandbytes or an artifact decides.
    """
    if settings.method != "lora" or settings.base is not None or settings.accelerate_config is not None:
        return ()
    names = tuple(name for name in (EMBEDDING_WEIGHT, HEAD_WEIGHT) if name in checkpoint.tensors)
    return names if all(checkpoint.tensors[name].dtype in ("bfloat16", "float16") for name in names) else ()


def _in_running_order(model: Any, checkpoint: Checkpoint) -> None:
    """Let modules of a layer stand in the order in which they run, as in the stock classes.

    PEFT draws adapters in the order of modules: the same seed gives the same adapter for both classes.
    """
    for layer, spec in zip(model.model.layers, checkpoint.config.layers, strict=True):
        for branch in reversed(spec.branches):
            layer._modules = {branch.module: layer._modules[branch.module], **layer._modules}


def fill(model: nn.Module, weights: WeightSource) -> None:
    """Give parameters without values those of a checkpoint or artifact, in float32.

    A tied head is the table itself.
    """
    from torch import nn

    from gemma_deploy.split.factory import read_tensor

    for name, one in list(model.named_parameters()):
        if name in weights.tensors and one.is_meta:
            set_parameter(model, name, nn.Parameter(read_tensor(weights, name)))
    fill_numbers(model, weights)
    if HEAD_WEIGHT not in weights.tensors:
        model.tie_weights()
    left = [name for name, one in model.named_parameters() if one.is_meta]
    if left:  # the checkpoint was checked against its config: a class that differs from it is a fault of ours
        raise AssertionError(f"no values for {left}")


def _quantized(settings: FinetuneSettings, checkpoint: Checkpoint, folder: Path) -> Any:
    """Linears in 4 bits: nf4, scales quantized again; everything else float32."""
    import bitsandbytes
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    place = checkpoint.path
    if checkpoint.is_dequantized or checkpoint.is_nested:
        place = folder / STAGED
        if not place.is_dir():
            stage_checkpoint(checkpoint.path, place)
    kind, config = training_class(settings, checkpoint)
    try:
        loaded = kind.from_pretrained(place, config=config, quantization_config=how, dtype=torch.float32)
    except (ImportError, RuntimeError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        raise UsageError(
            f"bitsandbytes {bitsandbytes.__version__} cannot quantize this model here: {said[:300]}",
            where="finetune.method: qlora",
            next_step='pip install "gemma-deploy[finetune,bitsandbytes]", or use `--method lora`',
        ) from error
    return prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)


def linear_kinds_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the linears of the layers, `q_proj` ..., in file order."""
    return tuple(dict.fromkeys(one.kind for layer in checkpoint.config.layers for one in layer.linears))


def targets_of(settings: FinetuneSettings, checkpoint: Checkpoint) -> list[str]:
    """Linears that get an adapter.

    Raises:
        UsageError: one of the names is no linear of a layer.
    """
    known = linear_kinds_of(checkpoint)
    asked = settings.lora.targets
    unknown = [name for name in asked or () if name not in known]
    if unknown or asked == []:
        raise UsageError(
            f"no linear of a layer is called {', '.join(unknown)}" if unknown else "no linear is named",
            where="finetune.lora.targets (--targets)",
            expected=", ".join(known),
            next_step="name some of these, or leave it out for all of them",
        )
    return list(dict.fromkeys(asked or known))
