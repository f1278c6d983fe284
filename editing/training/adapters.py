"""Low-rank adapters on a model in memory: which modules carry one, and what it adds to the weights after training.

Example:
    >>> shape = AdapterShape(rank=8, alpha=16, modules=adapter_modules(model, row, layers=range(4, 12)))
    >>> adapted = attach(model, shape, seed=0)
    >>> ...  # train
    >>> factors = learned_factors(adapted, shape)
    >>> model = detach(adapted)

Source: LoRA (Hu et al. 2021), through ``peft``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..edits.low_rank import Factors
from ..errors import EditError, RequestError
from ..modules import is_conv1d, is_linear
from ..wiring.row import Architecture


@dataclass(frozen=True)
class AdapterShape:
    """Rank and scale of an adapter, and the modules that carry it."""

    rank: int
    alpha: float
    """The update is scaled by alpha / rank."""
    modules: tuple[str, ...]
    """Full names of linear modules."""


def adapter_modules(model: nn.Module, row: Architecture, layers: Sequence[int], part: str = "all") -> tuple[str, ...]:
    """Names of the linear modules in the given decoder layers.

    Experts that are fused into one tensor are no modules, so no adapter is put on them; nor on routers, whose output is
    a choice, nor on what the adapter library refuses.

    Args:
        model: A causal language model.
        row: Its architecture.
        layers: Decoder layers, counted from 0.
        part: ``all``, or ``attention`` or ``mlp`` for one kind of sublayer; what mixes tokens in another way, such as a
            state-space layer, counts as attention.

    Raises:
        RequestError: There is no linear module to adapt.
    """
    wanted = None if part == "all" else parts_of(row, part)
    names = []
    for layer in layers:
        prefix = f"{row.layers}.{layer}."
        for name, module in model.get_submodule(prefix[:-1]).named_modules():
            inside = wanted is None or name.split(".")[0] in wanted
            if inside and is_linear(module) and _adaptable(model, name):
                names.append(prefix + name)
    if not names and row.mlp_units is None and part == "mlp":
        raise RequestError(
            "the experts of this model are fused into one tensor, which cannot carry an adapter; use modules=attention"
        )
    if not names:
        raise RequestError(
            f"the {part} part of layers {list(layers)} has no linear module to adapt; choose other layers or "
            "modules=all"
        )
    return tuple(names)


def without_adapter(model: nn.Module, row: Architecture, layers: Sequence[int]) -> tuple[int, float]:
    """In how many of the layers experts are fused into one tensor, which carries no adapter, and the share of the layers'
    weights that they hold."""
    fused = whole = 0
    of_layers = set()
    for layer in layers:
        for module in model.get_submodule(f"{row.layers}.{layer}").modules():
            for parameter in module.parameters(recurse=False):
                whole += parameter.numel()
                # The kernels of short convolutions have three dimensions too.
                if parameter.ndim == 3 and not isinstance(module, nn.Conv1d):
                    fused += parameter.numel()
                    of_layers.add(layer)
    return len(of_layers), fused / whole if whole else 0.0


def parts_of(row: Architecture, part: str) -> set[str]:
    """Modules of a layer that hold one kind of sublayer, by name."""
    start = f"{row.layers}.{{layer}}."
    patterns = [writer.pattern for writer in row.writers if writer.kind == part and writer.pattern.startswith(start)]
    inputs = row.mlp_inputs if part == "mlp" else ()
    return {pattern.removeprefix(start).split(".")[0] for pattern in patterns} | {name.split(".")[0] for name in inputs}


_ROUTERS = ("gate", "router", "shared_expert_gate")
_STATE_SPACE = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def _adaptable(model: nn.Module, name: str) -> bool:
    last = name.rpartition(".")[2]
    config: Any = model.config
    # peft refuses the output matrix of state-space layers in these types, because fused kernels pass it by.
    return last not in _ROUTERS and not (last == "out_proj" and config.model_type in _STATE_SPACE)


def attach(model: nn.Module, shape: AdapterShape, seed: int) -> Any:
    """Wrap the model with a fresh adapter in fp32; its output is unchanged until the adapter is trained.

    The base model's modules are wrapped in place; ``detach`` restores them.

    Args:
        model: The base model.
        shape: Rank, scale and modules.
        seed: Seed of the adapter's initial values; sets torch's global seed.

    Raises:
        EditError: The library put adapters on other modules than those of ``shape``.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=list(shape.modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        # peft has to be told that Conv1D stores its weight as [in, out].
        fan_in_fan_out=is_conv1d(model.get_submodule(shape.modules[0])),
    )
    with _targets_as_given():
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    carrying = {name.split(".lora_")[0] for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    # peft replaces some module names by others, such as those of fused experts.
    unexpected = carrying ^ {f"base_model.model.{name}" for name in shape.modules}
    if unexpected:
        raise EditError(
            f"peft put the adapter on other modules than requested: {', '.join(sorted(unexpected)[:3])}; "
            "choose other modules"
        )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


@contextmanager
def _targets_as_given() -> Iterator[None]:
    """Keep peft from renaming targets: it takes ``down_proj`` of a dense layer for what fused experts were once called."""
    from peft.utils import transformers_weight_conversion as conversion

    renaming = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = renaming


def loads_in_peft(model_type: str, modules: Sequence[str]) -> bool:
    """Whether peft puts a saved adapter back on the modules that it was trained on.

    In some models of experts it takes the names of dense modules for those of fused experts.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=list(modules))
    try:
        convert_peft_config_for_transformers(
            config, SimpleNamespace(config=SimpleNamespace(model_type=model_type)), None
        )
    except ValueError:
        return False
    return set(config.target_modules or ()) == set(modules)


def detach(adapted: Any) -> nn.Module:
    """Remove the adapter and return the base model."""
    # unload leaves the base weights as they were; merge_and_unload would add the adapter to them.
    base: nn.Module = adapted.unload()
    return base


@contextmanager
def switched_off(adapted: Any) -> Iterator[None]:
    """Run the base model, without its adapter, while the context lasts."""
    with adapted.disable_adapter():
        yield


def learned_factors(adapted: Any, shape: AdapterShape) -> dict[str, Factors]:
    """What the adapter adds to each weight, by parameter name, in the weight's layout, in fp32 on the CPU."""
    factors = {}
    for name in shape.modules:
        module = adapted.get_base_model().get_submodule(name)
        down = module.lora_A["default"].weight.detach().float().cpu()
        # The scale goes into one factor, so that the product alone is the update.
        up = module.lora_B["default"].weight.detach().float().cpu() * module.scaling["default"]
        stored_transposed = is_conv1d(module.base_layer)
        factors[f"{name}.weight"] = Factors(down.T, up.T) if stored_transposed else Factors(up, down)
    return {name: Factors(f.left.contiguous(), f.right.contiguous()) for name, f in factors.items()}
