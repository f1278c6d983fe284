"""``adapter_config.json`` of a PEFT adapter: which options it was trained with, and whether they can be merged."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ...editing.errors import CheckpointError, RequestError
from ..files.forms import Form, validated
from ..files.opened import OF_A_CHECKPOINT, Unreadable
from ..files.parsed import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WHOLE_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")
"""Files of a whole model, beside which an adapter has two readings."""
MERGE_WITH_PEFT = (
    "merge it with peft: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(NEW_FOLDER)"
)
WITHOUT_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "corda_rank",
})  # fmt: skip
"""Options that say how an adapter was trained or where it sits, which the names of its tensors say too."""
MERGED = frozenset({
    "alpha_pattern", "ensure_weight_tying", "init_lora_weights", "lora_alpha", "lora_bias", "r", "rank_pattern",
    "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
})  # fmt: skip
"""Options that decide what is added to the weights."""
NOT_WEIGHTS = {
    "alora_invocation_tokens": "it acts after certain tokens only, so no weights are the same as base and adapter",
    "arrow_config": "it chooses between adapters token by token, so no weights are the same as base and adapter",
    "layer_replication": "it repeats layers of the base, so the merged model has another depth",
}
"""Why some options cannot be merged at all."""
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights with which training started from the base's own weights."""
MAX_PATTERN, MAX_REPEATS = 300, 3


class _Config(Form):
    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_dora: bool = False
    init_lora_weights: bool | str | None = True
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[Annotated[int, Field(ge=0)]] | dict[str, list[Annotated[int, Field(ge=0)]]] | None = (
        None
    )
    ensure_weight_tying: bool = False


class AdapterConfig:
    """The options of an adapter that can be merged.

    Raises:
        CheckpointError: The file is damaged.
        RequestError: It is of another kind than LoRA, or has an option that cannot be merged.
    """

    def __init__(self, folder: Path, name: str):
        with OF_A_CHECKPOINT.about(f"{name}/{CONFIG}"):
            content = read_object(folder / CONFIG)
            about = validated(_Config, content)
            for pattern in (*(about.rank_pattern or {}), *(about.alpha_pattern or {})):
                _check_pattern(pattern)
        _check_options(content, name)
        self.about = about

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """LoRA rank of a module, and the factor on the product of its matrices.

        Source: LoRA (Hu et al. 2021) scales by alpha / r, rsLoRA (Kalajdzievski 2023) by alpha / sqrt(r).
        """
        about = self.about
        rank = _by_pattern(about.rank_pattern or {}, module, about.r)
        alpha = _by_pattern(about.alpha_pattern or {}, module, about.lora_alpha)
        return int(rank), alpha / (math.sqrt(rank) if about.use_rslora else rank)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no whole model."""
    return (folder / CONFIG).is_file() and not beside_whole_weights(folder)


def beside_whole_weights(folder: Path) -> bool:
    """Whether a folder holds an adapter's configuration and a whole model's weights."""
    return (folder / CONFIG).is_file() and any(any(folder.glob(pattern)) for pattern in WHOLE_WEIGHTS)


def check_not_adapter(folder: Path) -> None:
    """Check that a folder is a whole model without an adapter beside it.

    Raises:
        CheckpointError: It is an adapter, or holds both, which libraries read differently.
    """
    if beside_whole_weights(folder):
        raise CheckpointError(
            f"{folder.name} holds an adapter ({CONFIG}) beside a whole model: transformers would load the model with"
            f" the adapter, other programs without it; move {CONFIG} and its weights into a folder of their own, and"
            " give that folder for the model with the adapter, or this one for the model without"
        )
    if is_adapter(folder):
        raise CheckpointError(
            f"{folder.name} is a PEFT adapter, not a whole model; merge it into its base with"
            f" `excise apply {folder.name} --base BASE --out OUT`, and give OUT"
        )


def _check_options(content: Mapping[str, Any], name: str) -> None:
    kind = content["peft_type"]
    if kind != "LORA":
        raise RequestError(f"{name} is an adapter of the kind {kind!r:.40}, and only LORA is read; {MERGE_WITH_PEFT}")
    if content.get("init_lora_weights", True) not in KEEPS_BASE:
        raise RequestError(
            f"{name} was trained with init_lora_weights={content['init_lora_weights']!r:.40}, which changes the base's"
            f" weights before training; {MERGE_WITH_PEFT}"
        )
    for option, value in content.items():
        if option in WITHOUT_EFFECT | MERGED or not value:
            continue
        reason = NOT_WEIGHTS.get(option, "which this excise does not read")
        remedy = "load it with peft" if option in NOT_WEIGHTS else MERGE_WITH_PEFT
        raise RequestError(f"{name} was trained with {option}={value!r:.60}: {reason}; {remedy}")


def _check_pattern(pattern: str) -> None:
    """A pattern comes from somebody else's file, and some take years to compare."""
    if len(pattern) > MAX_PATTERN or len(re.findall(r"[*+{]", pattern)) > MAX_REPEATS or re.search(r"\)[*+{]", pattern):
        raise Unreadable(f"the pattern {pattern!r:.60} is too long, or repeats too much")
    try:
        re.compile(pattern)
    except re.error as error:
        raise Unreadable(f"the pattern {pattern!r:.60} is no regular expression: {error}") from error


def _by_pattern(values: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that a module's name ends with, as peft looks it up."""
    matching = (value for pattern, value in values.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(matching, default)
