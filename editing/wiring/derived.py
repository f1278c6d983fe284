"""Rows that are found out: which tensors of a model type write to the stream, from a small copy of the model.

Example:
    >>> row = derived_row({"model_type": "smollm3", "hidden_size": 2048})
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedArchitecture, one_line
from ..modules import is_linear
from .bench import Bench, bench_of, run
from .experts import fused_experts
from .roles import Role, kinds, writers
from .row import Architecture, Kind, Writer, pattern_of
from .small_copy import inputs_of, small_copy
from .stored import stored_forms

_VOLATILE = (
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "attn_implementation",
    "_attn_implementation", "quantization_config", "auto_map",
)  # fmt: skip

_OLD_BUFFERS = (r"\.rotary_emb\.inv_freq$", r"\.masked_bias$", r"\.attn(ention)?\.bias$")
"""Not weights: what older versions of transformers stored of positions and masks."""


def derived_row(config: dict[str, Any]) -> Architecture:
    """The row of a model type that the table lacks, found out on a small copy of the model. Each is made once.

    Args:
        config: The content of ``config.json``.

    Raises:
        UnsupportedArchitecture: No small copy can be built, or a tensor writes to the stream in some layers only.
    """
    steady = _steady(config)
    key = repr(sorted(steady.items(), key=repr))
    if key not in _ROWS:
        _ROWS[key] = _derived(steady)
    return _ROWS[key]


def residual_width_of(model: Any) -> int:
    """Width of what the first layer reads: not always that of the embedding, which some models project."""
    config = model.config.get_text_config(decoder=True)
    value = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    return int(value or model.get_input_embeddings().weight.shape[1])


def _steady(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that a model's wiring depends on."""
    return {
        str(key): _steady(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _VOLATILE
    }


_ROWS: dict[str, Architecture] = {}
"""Rows that this process found out, by configuration."""


def _derived(config: dict[str, Any]) -> Architecture:
    if config.get("is_encoder_decoder"):
        raise UnsupportedArchitecture(
            f"{config['model_type']} has an encoder and a decoder, each with a stream of its own; give a decoder-only model"
        )
    model = small_copy(config)
    try:
        bench = bench_of(model, inputs_of(model), residual_width_of(model))
        roles = writers(bench)
        row = _row(bench, roles, kinds(bench, roles)) if any(role.sublayer for role in roles) else None
    except (TypeError, RuntimeError, ValueError, AttributeError, LookupError, StopIteration) as error:
        # The code of another model, run on text alone, can fail anywhere.
        raise UnsupportedArchitecture(
            f"{config['model_type']}: a small copy of it does not run on text alone ({one_line(error, 120)}); add a row in "
            "editing/architectures.py"
        ) from error
    if row is None:
        raise UnsupportedArchitecture(
            f"{config['model_type']}: no tensor of its layers writes to the residual stream in a way that an edit of "
            "weights can reach; its layers mix or norm the stream itself"
        )
    return row


def _row(bench: Bench, roles: Sequence[Role], kinds: dict[str, Kind]) -> Architecture:
    path, forms = bench.layers_path, stored_forms(bench.model)
    found: dict[str, Writer] = {}
    for role in roles:
        kind, gains = kinds[role.name], tuple(pattern_of(f"{gain}.weight", path) for gain in role.gains)
        for name, axis in (
            (role.name, role.axis),
            *((form.name, form.axis_of(role.axis)) for form in forms.of(role.name)),
        ):
            # A name that several layers share is one writer; two that contradict each other are found by the proof.
            found.setdefault(pattern_of(name, path, forms.spellings), Writer("", axis, kind, gains, role.centred))
    _check_everywhere(bench, roles)
    patterns = {pattern: replace(w, pattern=pattern) for pattern, w in found.items()}
    named = [name for name, _ in bench.model.named_parameters()] + [name for name, _ in bench.model.named_buffers()]
    readers = {pattern_of(name, path, forms.spellings) for name in (*named, *forms.names)} - set(patterns)
    head = _name_of(bench.model, bench.model.get_output_embeddings())
    gained = [role for role in roles if role.gains and role.sublayer]
    words = bench.model.get_input_embeddings().weight
    attention = _units(bench, roles, kinds, "attention")
    neurons = _units(bench, roles, kinds, "mlp")
    return Architecture(
        writers=tuple(patterns.values()),
        readers=tuple(sorted(readers | {f"{head}.weight"})),
        embedding=_name_of(bench.model, bench.model.get_input_embeddings()) + ".weight",
        layers=path,
        sublayers=_sublayers(bench, roles),
        attention_units=attention,
        mlp_units=neurons,
        mlp_inputs=_neuron_inputs(bench, neurons) if neurons else (),
        unembedding=f"{head}.weight",
        gain_offset=gained[0].gain_offset if gained else 0.0,
        spellings=forms.spellings,
        ignored=(*(getattr(bench.model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_OLD_BUFFERS),
        tied=bench.model.get_output_embeddings().weight is words,
        fused=fused_experts(bench.model, path, [role.name for role in roles], forms),
        derived=True,
    )


def _check_everywhere(bench: Bench, roles: Sequence[Role]) -> None:
    """A name that writes to the stream in one layer has to do so in every layer that has it."""
    writing = {role.name for role in roles}
    patterns = {pattern_of(name, bench.layers_path) for name in writing}
    for name, _ in bench.model.named_parameters():
        if name not in writing and pattern_of(name, bench.layers_path) in patterns:
            raise UnsupportedArchitecture(
                f"{bench.model.config.model_type}: {name} does not write to the residual stream where other layers' "
                "tensor of that name does; add a row in editing/architectures.py"
            )


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def _sublayers(bench: Bench, roles: Sequence[Role]) -> tuple[str, ...]:
    """In the order in which they run."""
    names = list(dict.fromkeys(role.sublayer for role in roles if role.sublayer))
    order: list[str] = []
    handles = []
    for layer in bench.layers:
        for name in names:
            module = _submodule(layer, name)
            if module is not None:
                handles.append(module.register_forward_hook(lambda _, __, ___, n=name: order.append(n)))
    run(bench)
    for handle in handles:
        handle.remove()
    return tuple(dict.fromkeys(order))


def _submodule(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def _units(bench: Bench, roles: Sequence[Role], kinds: dict[str, Kind], kind: Kind) -> str | None:
    """The one linear module of every layer that holds units of this kind at its input."""
    owners = [role.name.rpartition(".")[0] for role in roles if kinds[role.name] == kind and role.sublayer]
    places = {re.sub(r"^\d+\.", "", owner.removeprefix(f"{bench.layers_path}.")) for owner in owners}
    if len(places) != 1:
        return None
    place = places.pop()
    modules = [_submodule(layer, place) for layer in bench.layers]
    if not all(module is not None and is_linear(module) for module in modules):
        return None
    # Of what mixes tokens, only attention has heads that can be silenced one by one.
    return None if kind == "attention" and "att" not in place else place


def _neuron_inputs(bench: Bench, place: str) -> tuple[str, ...]:
    """The modules beside it that compute its neurons, one output a neuron."""
    above, _, own = place.rpartition(".")
    layer = bench.layers[0]
    parent = layer.get_submodule(above) if above else layer
    module: Any = parent.get_submodule(own)
    count = module.weight.shape[1] if isinstance(module, nn.Linear) else module.weight.shape[0]
    names = []
    for name, other in parent.named_children():
        outputs = _outputs(other)
        if name != own and outputs in (count, 2 * count) and _feeds(bench, other, module, count):
            names.append(f"{above}.{name}" if above else name)
    return tuple(names)


def _outputs(module: nn.Module) -> int:
    if not is_linear(module):
        return 0
    weight: Any = module.weight
    return int(weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1])


def _feeds(bench: Bench, module: nn.Module, reader: nn.Module, count: int) -> bool:
    """Whether one output of a module moves one neuron alone."""
    seen: list[Tensor] = []
    keep = reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    run(bench, 0)

    def push(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        moved = out.clone()
        moved[..., 1] += 1.0
        return moved

    handle = module.register_forward_hook(push)
    run(bench, 0)
    handle.remove()
    keep.remove()
    changed = (seen[1] - seen[0]).abs().reshape(-1, count).amax(dim=0)
    return bool(changed[1] > 0 and changed.sum() == changed[1])
