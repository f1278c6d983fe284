"""Low-rank adapters on a model in memory: which modules carry one, and what it adds to the weights after training.

Example:
    >>> shape = adapter_shape(model, row, layers=range(4, 12), rank=8, alpha=16)
    >>> adapted = attach(model, shape, seed=0)
    >>> ...  # train
    >>> factors = learned_factors(adapted, shape)
    >>> model = detach(adapted)

Source: LoRA (Hu et al. 2021), through ``peft``.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..edits.low_rank import ExpertFactors, Factors, expert_factors
from ..errors import EditError, RequestError
from ..modules import is_conv1d, is_linear
from ..wiring.experts import fused_family
from ..wiring.row import Architecture
from .low_rank_layer import low_rank_layer, plain_layers

TINY = 1e-24
"""Added to a mean square, so that the root of 0 has a gradient."""


@dataclass(frozen=True)
class AdapterShape:
    """Rank and scale of an adapter, and the modules and fused experts that carry it."""

    rank: int
    alpha: float
    """The update is scaled by alpha / rank."""
    modules: tuple[str, ...]
    """Full names of linear modules."""
    experts: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Full names of parameters that hold all experts of a layer, with their number of experts."""

    @property
    def weights(self) -> tuple[str, ...]:
        """Full names of the parameters that the adapter changes."""
        return (*(f"{name}.weight" for name in self.modules), *self.experts)

    def describe(self) -> str:
        """What carries it, in words: "8 linear modules and 4 tensors of fused experts"."""
        counts = (f"{len(self.modules)} linear modules",) if self.modules else ()
        return " and ".join((*counts, *((f"{len(self.experts)} tensors of fused experts",) if self.experts else ())))


def adapter_modules(model: nn.Module, row: Architecture, layers: Sequence[int], part: str = "all") -> tuple[str, ...]:
    """Names of the linear modules in the given decoder layers.

    Experts that are fused into one tensor are no modules: ``adapter_experts`` names them. No adapter is put on routers,
    whose output is a choice, nor on what the adapter library refuses.

    Args:
        model: A causal language model.
        row: Its architecture.
        layers: Decoder layers, counted from 0.
        part: ``all``, or ``attention`` or ``mlp`` for one kind of sublayer; what mixes tokens in another way, such as a
            state-space layer, counts as attention.

    Raises:
        RequestError: There is no linear module to adapt.
    """
    names = _linear_modules(model, row, layers, part)
    if not names:
        fused = adapter_experts(model, row, layers, part)
        raise RequestError(
            f"the {part} part of layers {list(layers)} has "
            + ("only experts that are fused into one tensor, and no" if fused else "no")
            + " linear module to adapt; choose other layers or modules=all"
        )
    return names


def _linear_modules(model: nn.Module, row: Architecture, layers: Sequence[int], part: str) -> tuple[str, ...]:
    wanted = None if part == "all" else parts_of(row, part)
    names = []
    for layer in layers:
        prefix = f"{row.layers}.{layer}."
        for name, module in model.get_submodule(prefix[:-1]).named_modules():
            inside = wanted is None or name.split(".")[0] in wanted
            if inside and is_linear(module) and _adaptable(model, name):
                names.append(prefix + name)
    return tuple(names)


def adapter_experts(model: nn.Module, row: Architecture, layers: Sequence[int], part: str = "all") -> dict[str, int]:
    """Parameters of the given decoder layers that hold all experts of a layer, with their number of experts.

    Args:
        model: A causal language model; its weights are not read.
        row: Its architecture.
        layers: Decoder layers, counted from 0.
        part: ``all``, ``attention`` or ``mlp``, as for ``adapter_modules``.
    """
    wanted = None if part == "all" else parts_of(row, part)
    found = {}
    for layer in layers:
        prefix = f"{row.layers}.{layer}."
        for name, parameter in model.get_submodule(prefix[:-1]).named_parameters():
            inside = wanted is None or name.split(".")[0] in wanted
            if inside and parameter.ndim == 3 and fused_family(row, prefix + name):
                found[prefix + name] = len(parameter)
    return found


def adapter_shape(
    model: nn.Module,
    row: Architecture,
    layers: Sequence[int],
    *,
    rank: int,
    alpha: float,
    part: str = "all",
    experts: bool = True,
) -> AdapterShape:
    """The shape of an adapter on all that can carry one.

    Args:
        model: A causal language model; its weights are not read.
        row: Its architecture.
        layers: Decoder layers, counted from 0.
        rank: LoRA rank r.
        alpha: LoRA alpha.
        part: ``all``, ``attention`` or ``mlp``.
        experts: Whether experts that are fused into one tensor carry an adapter as well.

    Raises:
        RequestError: There is nothing to adapt.
    """
    fused = adapter_experts(model, row, layers, part) if experts else {}
    modules = _linear_modules(model, row, layers, part) if fused else adapter_modules(model, row, layers, part)
    return AdapterShape(rank, alpha, modules, fused)


def without_adapter(
    model: nn.Module, row: Architecture, layers: Sequence[int], experts: Collection[str] = ()
) -> tuple[int, float]:
    """In how many of the layers experts are fused into one tensor that carries no adapter, and the share of the layers'
    weights that they hold.

    Args:
        model: A causal language model; its weights are not read.
        row: Its architecture.
        layers: Decoder layers, counted from 0.
        experts: Names of the fused parameters that do carry one.
    """
    fused = whole = 0
    of_layers = set()
    for layer in layers:
        prefix = f"{row.layers}.{layer}"
        for name, module in model.get_submodule(prefix).named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                whole += parameter.numel()
                full = ".".join(part for part in (prefix, name, own) if part)
                # The kernels of short convolutions have three dimensions too.
                if parameter.ndim == 3 and not isinstance(module, nn.Conv1d) and full not in experts:
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
        target_parameters=list(shape.experts) or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        # peft has to be told that Conv1D stores its weight as [in, out].
        fan_in_fan_out=bool(shape.modules) and is_conv1d(model.get_submodule(shape.modules[0])),
    )
    if all(type(model.get_submodule(name)) in plain_layers() for name in shape.modules):
        config._register_custom_module(dict.fromkeys(plain_layers(), low_rank_layer()))
    with targets_as_given():
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    carrying = set(_carriers(adapted))
    # peft replaces some module names by others, such as those of fused experts.
    unexpected = carrying ^ set(shape.weights)
    if unexpected:
        raise EditError(
            f"peft put the adapter on other weights than requested: {', '.join(sorted(unexpected)[:3])}; "
            "choose other modules, or experts=false"
        )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _carriers(adapted: Any) -> dict[str, Any]:
    """The library's wrappers, by the name of the parameter that each of them adapts."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    found = {}
    for path, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            # The wrappers of two parameters of a module stand one inside the other.
            name = path.replace(".base_layer", "")
            found[f"{name}.{module.parameter_name if isinstance(module, ParamWrapper) else 'weight'}"] = module
    return found


@contextmanager
def targets_as_given() -> Iterator[None]:
    """Keep peft from renaming targets: it takes ``down_proj`` of a dense layer for what fused experts were once called."""
    from peft.utils import transformers_weight_conversion as conversion

    renaming = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = renaming


def loads_in_peft(model_type: str, modules: Sequence[str], experts: Collection[str] = ()) -> bool:
    """Whether peft puts a saved adapter back on the modules that it was trained on.

    In some models of experts it takes the names of dense modules for those of fused experts.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=list(modules), target_parameters=list(experts) or None)
    try:
        convert_peft_config_for_transformers(
            config, SimpleNamespace(config=SimpleNamespace(model_type=model_type)), None
        )
    except ValueError:
        return False
    parameters = set(config.target_parameters or ())
    return set(config.target_modules or ()) == set(modules) and parameters == set(experts)


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


def learned_factors(adapted: Any, shape: AdapterShape) -> dict[str, Factors | ExpertFactors]:
    """What the adapter adds to each weight, by parameter name, in the weight's layout, in fp32 on the CPU."""
    carriers = _carriers(adapted)
    factors: dict[str, Factors | ExpertFactors] = {}
    for name in shape.weights:
        found = _factors_of(carriers[name], shape.experts.get(name))
        left, right = (part.detach().float().cpu().contiguous() for part in (found.left, found.right))
        factors[name] = type(found)(left, right)
    return factors


def update_rms(adapted: Any, shape: AdapterShape) -> Float[Tensor, ""]:
    """Root mean square of all numbers that the adapter adds to the weights, with its gradient.

    Where nothing is added yet, the gradient is 0 and not undefined.
    """
    carriers, squares, count = _carriers(adapted), [], 0
    for name in shape.weights:
        found = _factors_of(carriers[name], shape.experts.get(name))
        left, right = found.left.float(), found.right.float()
        # |LR|^2 = <L'L, RR'>: the product itself, as large as the weight, is never made.
        squares.append(((left.mT @ left) * (right @ right.mT)).sum().cpu())
        count += left.shape[-2] * right.shape[-1] * (len(left) if left.ndim == 3 else 1)
    return (torch.stack(squares).sum() / count + TINY).sqrt()


def _factors_of(module: Any, experts: int | None) -> Factors | ExpertFactors:
    """What one of the library's wrappers adds to its weight, in that weight's layout, where it is."""
    # The scale goes into one factor, so that the product alone is the update.
    down, up = module.lora_A["default"].weight, module.lora_B["default"].weight * module.scaling["default"]
    if experts is not None:
        return expert_factors(down, up, experts, inputs_first=_inputs_first(module))
    return Factors(*((down.mT, up.mT) if is_conv1d(module.base_layer) else (up, down)))


def _inputs_first(wrapper: Any) -> bool:
    return bool(getattr(wrapper.get_base_layer(), "is_transposed", False))
