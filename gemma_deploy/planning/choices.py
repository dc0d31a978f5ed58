"""What a model could be compiled to: a back end, a precision and a division, as the recipe that asks for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import DeployError
from gemma_deploy.job import Job, model_problems
from gemma_deploy.planning import PRECISIONS
from gemma_deploy.recipe import Recipe, check_against_model, check_built
from gemma_deploy.recipe.rules import LENGTH_MULTIPLE

TABLE_GROUP, KEPT_W8 = 64, ["k_proj", "v_proj", "down_proj"]  # as the shipped recipes have them
OWN_DIVISION = "vllm"  # divides a checkpoint when it loads it, so that no recipe says how
# Mean KL to float32, nats a token, of the real Gemma 3 270M on WikiText-2, and where it was measured.
LARGEST_KL = 0.005  # of what is proposed, where anything of that quality fits
TABLES, KERNELS = "docs/benchmarks.md, Quality", "docs/kernels.md"
MEASURED_KL: dict[tuple[str, str], tuple[float, str]] = {
    ("tvm_vacc", "fp32"): (0.0, "README.md"),
    ("tvm_vacc", "bf16"): (0.0, "docs/benchmarks.md, Quality: the numbers of bfloat16 weights to the bit"),
    ("tvm_vacc", "fp16"): (8.4e-6, TABLES),
    ("tvm_vacc", "w8a16"): (0.0075, "README.md"),
    ("tvm_vacc", "w8a16_gptq"): (0.00175, TABLES),
    ("tvm_vacc", "w8a16_gptq+kv8"): (0.0019, "README.md"),
    ("onnxruntime", "w8a16"): (0.0063, TABLES),
    ("onnxruntime", "w8a16_gptq"): (0.0018, TABLES),
    ("onnxruntime", "w8a16_gptq+kv8"): (0.0065, "docs/benchmarks.md, int8 caches"),
    ("onnxruntime", "w8a8"): (0.0048, TABLES),
    ("onnxruntime", "w4a16_gptq"): (0.044, TABLES),
    ("native", "fp16"): (6.2e-5, f"{KERNELS}, Layout"),
    ("native", "w8a16"): (0.0063, "README.md"),
    ("native", "w8a16_gptq"): (0.0018, "README.md"),
    ("native", "w8a8"): (0.0085, f"{KERNELS}, Activations of 8 bits"),
    ("native", "w4a16_gptq"): (0.044, "README.md"),
    ("openvino", "w8a16"): (0.0052, "docs/openvino.md"),
    ("openvino", "w8a16_gptq"): (0.0033, "docs/openvino.md"),
}


@dataclass(frozen=True)
class Wanted:
    """What a model is to do.

    Args:
        prompt: P, the longest prompt; context: C, positions of the cache; batch: sequences at a time.
    """

    prompt: int = 1024
    context: int = 2048
    batch: int = 1


@dataclass(frozen=True)
class Choice:
    """One way to compile a model.

    Args:
        ranks: devices that share a layer; points: layers that begin a new stage.
    """

    backend: str
    precision: str
    ranks: int = 1
    points: tuple[int, ...] = ()

    @property
    def devices(self) -> int:
        """How many it takes."""
        return self.ranks * (len(self.points) + 1)

    @property
    def in_recipe(self) -> bool:
        """Whether the division is the artifact's own."""
        return self.backend != OWN_DIVISION


def longest(config_limit: int, wanted: Wanted) -> Wanted:
    """The same with lengths that a recipe may have: multiples of 16, no longer than the model was made for."""
    most = config_limit - config_limit % LENGTH_MULTIPLE
    up = [min(most, -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE) for length in (wanted.prompt, wanted.context)]
    return Wanted(min(up), up[1], wanted.batch)


def recipe_values(checkpoint: Checkpoint, choice: Choice, wanted: Wanted) -> dict[str, Any]:
    """The keys of the recipe that asks for it."""
    dtype, quantize = PRECISIONS[choice.precision]
    config, path = checkpoint.config, str(checkpoint.path)
    name = re.sub(r"[^\w.+-]+", "-", checkpoint.path.stem if path.endswith(".gguf") else checkpoint.path.name)
    shape: dict[str, Any] = {"input_ids": [[wanted.prompt], [wanted.context]]}
    if choice.backend in ("tvm_vacc", "tvm") and wanted.batch > 1:
        shape["batch"] = wanted.batch
    frontend: dict[str, Any] = {"checkpoint": path, "shape": shape}
    values: dict[str, Any] = {"name": f"{name.strip('.-') or 'model'}-{choice.backend}-{choice.precision}"}
    values["frontend"] = frontend
    if choice.ranks > 1 and choice.in_recipe:
        frontend["model_kwargs"] = {"tp": choice.ranks, "align_qkv": True}
    if quantize is not None:
        frontend["quantize"] = {"type": quantize}
        own = frontend["quantize"]
        if "gptq" in quantize and choice.backend in ("native", "onnxruntime") and config.hidden_size % TABLE_GROUP == 0:
            own["table"] = f"int8_g{TABLE_GROUP}"
        if quantize.startswith("w4") and choice.backend != OWN_DIVISION:
            own["calib_args"] = {"keep_w8": KEPT_W8, "sensitivity": False}
        if quantize not in ("w8a16",):
            values["dataset"] = {"name": "c4:48,alpaca:4,ceval:12", "seqlen": min(512, wanted.context)}
    if choice.points and choice.in_recipe:
        values["split"] = {"points": list(choice.points)}
    values["backend"] = {"type": choice.backend, "dtype": dtype}
    if choice.backend == "onnxruntime" and quantize == "w8a16_gptq":
        values["backend"]["compile"] = {"block": 32}
    return values


def recipe_text(checkpoint: Checkpoint, choice: Choice, wanted: Wanted) -> str:
    """The recipe as YAML."""
    import yaml

    return yaml.safe_dump(recipe_values(checkpoint, choice, wanted), sort_keys=False, allow_unicode=True, width=110)


def open_choice(checkpoint: Checkpoint, choice: Choice, wanted: Wanted) -> Job | str:
    """The job of a choice, or why there is none, a sentence: what `compile` would refuse."""
    try:
        recipe = Recipe.from_text(recipe_text(checkpoint, choice, wanted), env={})
        check_built(recipe)
        job = Job.of(recipe, checkpoint)
        problems = model_problems(job.spec, checkpoint.config)
        check_against_model(recipe, checkpoint.config.max_position_embeddings, problems)
    except DeployError as error:
        return "; ".join(error.problems) or error.what
    return job
