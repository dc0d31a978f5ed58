"""What a fine-tuning is asked for: the section `finetune:` of a recipe, and the options of the command.

Everything that SFTConfig of TRL has a field for keeps its name there and goes through `sft`, checked (arguments.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemma_deploy.errors import UsageError

LOGITS_BYTES = 64 << 20  # of one block of logits in float32: 64 rows of a vocabulary of 262,144
Positive = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class LoraSettings(_Section):
    """The adapter: rank, scale and the kinds of linears that get one.

    The update of a matrix is B A alpha / r, or alpha / sqrt(r) with `rslora` (PEFT's LoraConfig). `targets` are names
    such as q_proj; null: every linear of a layer.
    """

    r: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[list[Text], Field(min_length=1)] | None = None
    rslora: bool = False
    dora: bool = False


class FinetuneSettings(_Section):
    """A fine-tuning: data, method, and where the result goes.

    Args:
        data: a file of examples (data.py); field: the key that holds the text of each; format: what the file holds.
        method: `lora`, `qlora` (LoRA on 4-bit weights of bitsandbytes) or `full` (every weight).
        base: an int8 artifact of the checkpoint, whose codes LoRA is trained on; null: the checkpoint's own weights.
        model: `stock`, the class of transformers, or `patched`, the one that is compiled; both attend eagerly.
        loss: `answers` counts the tokens of answers alone where the data say which part is one; `all` every token.
        max_length: tokens of an example at most, null: 1024 or what the model takes; too_long: cut longer ones, or
            refuse them.
        eval_data: held-out examples; null: `validation` of the data, a share below 1 or a number.
        patience: evaluations without a better loss after which training ends; null: never before its time.
        samples: held-out examples that are answered before and after.
        devices: processes that train together; accelerate_config: a file that `accelerate config` wrote.
        lora: of `lora` and `qlora`; sft: fields of TRL's SFTConfig.
    """

    data: Text | None = None
    field: Text | None = None
    format: Literal["auto", "text", "messages", "alpaca", "prompt"] = "auto"
    method: Literal["lora", "qlora", "full"] = "lora"
    base: Text | None = None
    out: Text | None = None
    model: Literal["stock", "patched"] = "stock"
    loss: Literal["answers", "all"] = "answers"
    max_length: Annotated[int, Field(ge=2)] | None = None
    too_long: Literal["cut", "refuse"] = "cut"
    eval_data: Text | None = None
    validation: Annotated[float, Field(ge=0)] = 0.05
    patience: Positive | None = None
    samples: Annotated[int, Field(ge=0, le=20)] = 3
    devices: Positive | None = None
    accelerate_config: Text | None = None
    lora: LoraSettings = LoraSettings()
    sft: dict[str, Any] = {}


def settings_of(values: Mapping[str, Any], *, where: str, next_step: str) -> FinetuneSettings:
    """Check settings that are no recipe's.

    Args:
        values: keys of `FinetuneSettings`, sections as mappings; where, next_step: for the error.

    Raises:
        UsageError: all that are unknown or of another type.
    """
    try:
        return FinetuneSettings.model_validate(dict(values))
    except ValidationError as error:
        said = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False)]
        raise UsageError("these settings cannot be used", where=where, problems=said, next_step=next_step) from error
