"""What adapter_config.json says, checked all at once; fields that change the maths and are not carried out are refused.

The fields are those of `peft.LoraConfig` (peft 0.17 to 0.21). Reads one small file and no weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_deploy import reading
from gemma_deploy.checkpoint.index import read_json
from gemma_deploy.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

# Fields that change what is computed, and that nothing here carries out.
NOT_CARRIED_OUT = {
    "alora_invocation_tokens": "it acts only behind its invocation tokens, so it cannot be merged",
    "alora_invocation_string": "it acts only behind its invocation string, so it cannot be merged",
    "arrow_config": "it chooses among adapters for each token",
    "kasa_config": "it truncates the base's singular values",
    "layer_replication": "it builds another stack of layers",
    "megatron_config": "its layers are Megatron's",
    "monteclora_config": "it draws its weights at random",
    "target_parameters": "it adapts parameters that belong to no linear",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "it pools the inputs of its factors",
    "velora_config": "it compresses what its factors are given",
}
# Ways to start the training that change the base's weights: the adapter is then one of the changed base.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
CONVERT = (
    "convert it with peft: save the adapter before training too, and call save_pretrained(DIR, "
    "path_initial_model_for_weight_conversion=THAT) afterwards (LoftQ has no conversion: merge it with peft)"
)
# Fields that change nothing here: how it was trained, where, by which version, and what the tensors' names say anyway.
NEUTRAL = frozenset(
    {
        *("auto_mapping", "revision", "inference_mode", "task_type", "peft_version", "lora_dropout", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
    }
)
# Carried out; `base_model_name_or_path` and `peft_type` are read elsewhere, and so is `init_lora_weights`.
CARRIED_OUT = frozenset(
    {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"),
        *("modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
        *("base_model_name_or_path", "peft_type", "init_lora_weights"),
    }
)
LARGEST_RANK = 1 << 16
# How many ways of matching the patterns of a file may have, together, for one name: a file from anywhere must not keep
# the program busy for ever.
MOST_WAYS, NAME_LENGTH = 10_000_000, 60
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")
_REPEAT = re.compile(r"(?<![\\(])[*+{?]")


@dataclass(frozen=True)
class AdapterSettings:
    """What the maths of a LoRA adapter depends on.

    Args:
        r, lora_alpha: rank, and what it is scaled by, where no pattern says another.
        rank_pattern, alpha_pattern: regular expression for the end of a module's path -> its own; the first one counts.
        use_rslora: scale by alpha / sqrt(r) in the place of alpha / r.
        use_dora: a magnitude for each row.
        lora_bias: the second factor has a bias.
        modules_to_save: ends of the paths of modules that are trained as a whole.
        trainable_token_indices: rows that are trained, of the modules whose paths end like that; "" for the table.
        ensure_weight_tying: what is done to the table is done to a head that is tied to it.
        base: `base_model_name_or_path`.
        notes: what of the file has no effect.
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ensure_weight_tying: bool = False
    base: str | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, directory: Path) -> AdapterSettings:
        """Read and check `adapter_config.json`.

        Raises:
            CheckpointError: it is not there or damaged, or asks for what is not carried out: all of it at once.
        """
        path = directory / CONFIG_NAME
        raw, _ = read_json(path, missing=f"name a directory that peft's save_pretrained wrote; it holds {CONFIG_NAME}")
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> AdapterSettings:
        """See `read`; `where` is for messages."""
        fields = _Fields(raw)
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(
                f"the adapter's peft_type is {_short(kind)}",
                where=where,
                expected="LORA (with rsLoRA and DoRA)",
                next_step="merge another kind with peft (merge_and_unload, save_pretrained), and pass the merged model",
            )
        fields.refuse()
        settings = cls(
            r=int(fields.number("r", 8, whole=True)),
            lora_alpha=fields.number("lora_alpha", 8),
            rank_pattern={key: int(value) for key, value in fields.pattern("rank_pattern", whole=True).items()},
            alpha_pattern=fields.pattern("alpha_pattern"),
            use_rslora=fields.flag("use_rslora"),
            use_dora=fields.flag("use_dora"),
            lora_bias=fields.flag("lora_bias"),
            modules_to_save=fields.names("modules_to_save"),
            trainable_token_indices=fields.tokens("trainable_token_indices"),
            ensure_weight_tying=fields.flag("ensure_weight_tying"),
            base=fields.text("base_model_name_or_path"),
            notes=fields.notes(),
        )
        if fields.problems:
            raise CheckpointError(
                f"{len(fields.problems)} field(s) of the adapter cannot be carried out",
                where=where,
                problems=fields.problems,
                next_step="train a plain LoRA, or merge it with peft where you trust it and pass the merged model",
            )
        return settings

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its path in the model that was trained."""
        key = first_match(self.rank_pattern, module)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_of(self, module: str) -> float:
        """Likewise what its update is scaled by."""
        key = first_match(self.alpha_pattern, module)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def scaling_of(self, module: str, r: int) -> float:
        """The factor of `B @ A`: alpha / r, or alpha / sqrt(r), as `peft.tuners.lora.LoraLayer.update_layer`."""
        return self.alpha_of(module) / (math.sqrt(r) if self.use_rslora else r)

    def is_saved(self, module: str) -> bool:
        """Whether a module was trained as a whole, by itself or in a larger one."""
        return any(is_in(module, name) for name in self.modules_to_save)


def is_in(module: str, name: str) -> bool:
    """Whether a module, or one that it is in, has a path that ends with a name of modules_to_save: peft wraps that."""
    return any(f"{module}."[:at].endswith(name) for at, letter in enumerate(f"{module}.") if letter == ".")


def matches(patterns: Mapping[str, Any], module: str) -> list[str]:
    """Patterns that match the end of a path, in the order of the file; peft takes the first (`get_pattern_key`)."""
    return [key for key in patterns if re.match(rf"(.*\.)?({key})$", module)]


def first_match(patterns: Mapping[str, Any], module: str) -> str | None:
    """The pattern that counts."""
    return next(iter(matches(patterns, module)), None)


class _Fields:
    """The fields of the file, and what is wrong with them."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.problems: list[str] = []

    def wrong(self, key: str, expected: str) -> None:
        self.problems.append(f"{key}: {_short(self.raw[key])}, expected {expected}")

    def refuse(self) -> None:
        """Fields that are set and not carried out."""
        for key, value in self.raw.items():
            if key in NOT_CARRIED_OUT and _set(value):
                self.problems.append(f"{key} is set: {NOT_CARRIED_OUT[key]}")
            elif _set(value) and key not in NOT_CARRIED_OUT.keys() | NEUTRAL | CARRIED_OUT:
                self.problems.append(f"{_short(key)} is set to {_short(value)}: this field is not known here")
        start = self.raw.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
            self.problems.append(
                f"init_lora_weights is {_short(start)}, which changes the base's own weights: {CONVERT}"
            )

    def notes(self) -> tuple[str, ...]:
        if self.raw.get("fan_in_fan_out"):
            return ("fan_in_fan_out has no effect: the linears of a Gemma are no Conv1D, as peft says when it trains",)
        return ()

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and type(value) is not bool:
            self.wrong(key, "true or false")
        return value is True

    def text(self, key: str) -> str | None:
        value = self.raw.get(key)
        if value is not None and type(value) is not str:
            self.wrong(key, "a path or a name")
        return value if isinstance(value, str) and value else None

    def number(self, key: str, default: float, *, whole: bool = False) -> float:
        value = self.raw.get(key, default)
        if not _is_number(value, whole=whole):
            self.wrong(key, _number(whole))
            return default
        return float(value)

    def names(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            self.wrong(key, "a list of names")
            return ()
        return tuple(value)

    def pattern(self, key: str, *, whole: bool = False) -> dict[str, float]:
        value = self.raw.get(key)
        if not _set(value):
            return {}
        if not isinstance(value, dict):
            self.wrong(key, "a number for each regular expression")
            return {}
        if sum(map(ways_to_match, value)) > MOST_WAYS:
            self.problems.append(f"{key}: its patterns could take for ever to match; write the modules' paths out")
            return {}
        found = {}
        for name, one in value.items():
            if why := why_no_pattern(name):
                self.problems.append(f"{key}: {_short(name)} {why}")
            elif not _is_number(one, whole=whole):
                self.problems.append(f"{key}: {_short(one)} of {_short(name)}, expected {_number(whole)}")
            else:
                found[name] = one
        return found

    def tokens(self, key: str) -> dict[str, tuple[int, ...]]:
        """Rows by the end of a module's path; a list alone is of the token table."""
        value = self.raw.get(key)
        if value is None:
            return {}
        lists = {"": value} if isinstance(value, list) else value
        if not isinstance(lists, dict) or not all(_are_rows(rows) for rows in lists.values()):
            self.wrong(key, "a list of token ids, each once, or one for each module")
            return {}
        return {name: tuple(rows) for name, rows in lists.items()}


def why_no_pattern(pattern: str) -> str | None:
    """Why a regular expression is not taken; None where it is."""
    if _REPEATED_GROUP.search(pattern):
        return "repeats a group, which can take for ever to match: write it out"
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        return f"is no regular expression: {error}"
    return None


def ways_to_match(pattern: str) -> float:
    """An upper bound of the ways in which a pattern without repeated groups matches a name: what it costs to try."""
    repeats, groups, bars = len(_REPEAT.findall(pattern)), max(1, pattern.count("(")), pattern.count("|")
    repeats, power = min(repeats, 50), min(groups, 50)  # beyond them no pattern is taken, and no float overflows
    return math.comb(NAME_LENGTH + repeats, repeats) * min(bars / groups + 1, 1000) ** power


def _is_number(value: Any, *, whole: bool) -> bool:
    if whole:
        return type(value) is int and 1 <= value <= LARGEST_RANK
    return type(value) in (int, float) and abs(value) < 1e30


def _number(whole: bool) -> str:
    return f"a whole number from 1 to {LARGEST_RANK}" if whole else "a number"


def _are_rows(rows: Any) -> bool:
    if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
        return False
    return len(set(rows)) == len(rows)


def _set(value: Any) -> bool:
    """Whether a field says anything."""
    return value is not None and value is not False and value != {} and value != [] and value != ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse_other_adapters(directory: Path) -> None:
    """Say in plain words what a directory is that holds no adapter of peft in safetensors.

    Raises:
        CheckpointError: it is none.
    """
    if absent := reading.why_absent(directory):
        raise CheckpointError(
            absent,
            where=str(directory),
            expected=f"a directory with {CONFIG_NAME} and {WEIGHTS_NAME}",
            next_step="check the path (frontend.adapter, --adapter)",
        )
    has = {name: reading.is_file(directory / name) for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME)}
    if has[CONFIG_NAME] and has[WEIGHTS_NAME]:
        return
    step = f"name a directory that peft's save_pretrained wrote; it holds {CONFIG_NAME} and {WEIGHTS_NAME}"
    if not reading.is_dir(directory):
        what, step = (
            "this is a file, and an adapter is a directory",
            f"name the directory it lies in: {directory.parent}",
        )
    elif has[PICKLE_NAME] and not has[WEIGHTS_NAME]:
        what = f"{PICKLE_NAME} is pickled; it can run code when loaded and is never opened"
        step = "save the adapter as safetensors: load it in peft where you trust it, then save_pretrained(DIR)"
    elif reading.is_file(directory / "adapters.safetensors"):
        what = "this is an adapter of mlx-lm (adapters.safetensors), not one of peft"
    elif reading.is_file(directory / "model.safetensors") or reading.is_file(
        directory / "model.safetensors.index.json"
    ):
        what, step = "this is a whole model, not an adapter", "pass it as the checkpoint"
    else:
        what = f"there is no {WEIGHTS_NAME if has[CONFIG_NAME] else CONFIG_NAME}"
    raise CheckpointError(what, where=str(directory), expected=f"{CONFIG_NAME} and {WEIGHTS_NAME}", next_step=step)
