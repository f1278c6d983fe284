"""A small copy of a model: its own class and options, every kind of layer, and random weights a few wide.

How a model is wired can be tried out on such a copy in seconds, whatever the size of the model: only ``config.json`` is
needed. Sizes shrink by one factor, so that what is a product or a ratio of others stays one; counts of layers and of
experts are cut.

Example:
    >>> model = small_copy({"model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36})
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..errors import UnsupportedArchitecture, one_line

HEAD = 8
"""Size of an attention head in a small copy."""
VOCABULARY = 160
LENGTH = 64
EXPERTS = 4
LAYERS = 4
CHUNK = 8
"""Tokens that a state-space layer computes at once; short texts are padded to it."""
INNER = 96
"""Most neurons of an MLP."""
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "layers", "num_blocks")
_COUNTS_OF_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_EXPERT_COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts",
)  # fmt: skip
_EXPERTS_READ = (
    "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts",
)  # fmt: skip
_KEPT = (
    "patch_size", "temporal_patch_size", "image_size", "vocab_size", "kernel_size", "conv_kernel_size", "group_size",
    "spatial_merge_size", "conv_kernel", "crop_size", "merge_size", "layer_group_size", "block_size",
    "mamba_d_conv", "linear_conv_kernel_dim", "conv1d_width", "ngram_size", "ple_conv_kernel_size",
    "short_conv_kernel_size", "tile_size", "attention_chunk_size", "sliding_window_size", "downsample_ratio",
    "model_parallel_size", "audio_merge_size", "codebook_size",
)  # fmt: skip
_MOST = {
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"), LENGTH),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), CHUNK),
    **dict.fromkeys(_EXPERT_COUNTS, EXPERTS),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    "moe_layer_end_index": LAYERS - 1,
    # Layers that predict further tokens, or read others' keys, stand beside what is tried here.
    **dict.fromkeys(("num_kv_shared_layers", "num_nextn_predict_layers", "num_mtp_modules"), 0),
}
"""The largest number that a small copy has of these."""
_SIZES = ("_size", "_dim", "_rank", "_width", "_channels", "_inner")
_MORE_SIZES = (
    *_WIDTHS, "head_dim", "n_inner", "rotary_dim", "d_inner", "d_kv", "d_ff", "kv_channels", "mamba_d_head",
    "mamba_d_ssm", "mamba_headdim", "intermediate_size_mlp", "hidden_size_per_layer_input", "attention_head_dim",
    "global_head_dim", "d_rel", "time_step_rank", "mamba_dt_rank",
)  # fmt: skip
_LISTS_OF_LAYERS = ("_layers", "_ids", "_indices", "_idxs", "_indexes")
_LEFT_OUT = (
    "auto_map", "quantization_config", "_name_or_path", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id",
)  # fmt: skip


def small_copy(config: dict[str, Any], seed: int = 0) -> Any:
    """A model of the class that the configuration names, 2 to 4 layers deep and a few numbers wide, with random weights.

    Every parameter differs from what a fresh model has (gains are not 1, biases not 0), so that whatever an edit
    forgets can be seen.

    Args:
        config: The content of ``config.json``.
        seed: Seed of the weights.

    Raises:
        UnsupportedArchitecture: transformers does not know the type, or no small copy of it can be built.
    """
    kind, small = model_class(config), small_config(config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _built(kind, small)
            _perturb(model)
    except Exception as error:  # a configuration of another's making can fail anywhere in its model's code
        raise UnsupportedArchitecture(
            f"{config['model_type']}: no small copy can be built to find out which tensors write to the residual "
            f"stream ({one_line(error, 150)}); add a row in editing/architectures.py"
        ) from error
    return model.eval()


def model_class(config: dict[str, Any]) -> Any:
    """The class of transformers that ``config.json`` names, or the one that its type is loaded as.

    Raises:
        UnsupportedArchitecture: This version of transformers does not know the type.
    """
    import transformers

    named = [name for name in config.get("architectures") or () if isinstance(name, str)]
    for name in named:
        # Only classes that make text: a classifier has no unembedding.
        if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) and hasattr(transformers, name):
            return getattr(transformers, name)
    kind = str(config.get("model_type"))
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        found = getattr(transformers, names.get(kind, ""), None)
        # Some wrappers are listed with the class of their text tower, whose configuration is another one.
        if found is not None and found.config_class is CONFIG_MAPPING[kind]:
            return found
    raise UnsupportedArchitecture(
        f"model_type {kind!r} is not known to transformers {transformers.__version__} as a model that writes text; "
        "give a model that it knows, or install a newer version"
    )


def small_config(config: dict[str, Any]) -> Any:
    """The configuration of a small copy, as an object of transformers."""
    full = full_config(config)
    try:
        return type(full).from_dict(_shrunk(full.to_dict(), full))
    except Exception as error:  # validators of each configuration class raise kinds of their own
        raise UnsupportedArchitecture(
            f"{config['model_type']}: its configuration cannot be made small ({one_line(error, 150)}); add a row in "
            "editing/architectures.py"
        ) from error


def full_config(config: dict[str, Any]) -> Any:
    """A model's configuration as transformers completes it.

    Raises:
        UnsupportedArchitecture: transformers does not know the type, or takes no such configuration for it.
    """
    from transformers import AutoConfig

    given = {key: _decoded(value) for key, value in config.items() if key not in (*_LEFT_OUT, "model_type")}
    try:
        return AutoConfig.for_model(config["model_type"], **given)
    except Exception as error:  # validators of each configuration class raise kinds of their own
        raise UnsupportedArchitecture(
            f"config.json is no configuration of a {config.get('model_type')!r:.40} ({one_line(error, 150)}); fetch the "
            "checkpoint again, or install a newer transformers"
        ) from error


def _decoded(value: Any) -> Any:
    """transformers stores infinity as ``{"__float__": "Infinity"}``, which JSON has no number for."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _decoded(part) for key, part in value.items()}
    return [_decoded(part) for part in value] if isinstance(value, list) else value


def _built(kind: Any, config: Any) -> Any:
    # eager: every implementation computes the same, and this one takes every shape.
    return kind._from_config(config, attn_implementation="eager", dtype=torch.float32)


@torch.no_grad()
def _perturb(model: Any) -> None:
    for parameter in model.parameters():
        spread = 0.2 if parameter.dim() < 2 else 0.1
        parameter.nan_to_num_(0.0).add_(spread * torch.randn(parameter.shape))


def _shrunk(values: dict[str, Any], full: Any) -> dict[str, Any]:
    values = _without(values)
    text = full.get_text_config(decoder=True)
    inner = next((key for key in full.sub_configs if getattr(full, key, None) is text), None)
    numbers = values if inner is None else values[inner]
    old_width, old_length = _value(text.to_dict(), _WIDTHS), _value(text.to_dict(), _COUNTS_OF_LAYERS)
    factor, width = _factor(text)
    towers = {}
    for key in full.sub_configs:
        part = values.get(key)
        if isinstance(part, dict) and key != inner:
            _shrink_tower(part, old_width, width)
            # Kept apart: where the language model's options stand beside a tower, they shrink next.
            towers[key] = values.pop(key)
    if inner is not None:
        for key, value in list(values.items()):
            if isinstance(value, int) and not isinstance(value, bool) and value == old_width:
                values[key] = width
            elif isinstance(value, int) and key.startswith("vocab_size"):
                values[key] = VOCABULARY
    _shrink_text(numbers, factor, old_length)
    values |= towers
    # Some wrappers read it from themselves, and have it nowhere.
    values.setdefault("pad_token_id", None)
    _name_tokens(values)
    return values


def _without(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _LEFT_OUT
    }


def _factor(text: Any) -> tuple[int, int]:
    """By how much sizes shrink, and the width that comes of it."""
    values = text.to_dict()
    width, heads = _value(values, _WIDTHS), _value(values, _HEADS)
    head = values.get("head_dim") or values.get("qk_rope_head_dim") or (width // heads if width and heads else None)
    smallest = 16 if any(isinstance(value, float) and value < 1 for value in _rotary(values)) else HEAD
    factor = max(1, int(head or 64) // smallest)
    while factor > 1 and width % factor:
        factor -= 1
    return factor, width // factor


def _rotary(values: dict[Any, Any]) -> Iterator[Any]:
    for key, value in values.items():
        if key in ("partial_rotary_factor", "rotary_pct"):
            yield value
        elif isinstance(value, dict):
            yield from _rotary(value)


def _value(values: dict[str, Any], keys: Sequence[str]) -> int:
    return next((int(values[key]) for key in keys if isinstance(values.get(key), int)), 0)


def _shrink_text(values: dict[str, Any], factor: int, length: int) -> None:
    chosen, old = _layers(values, length), dict(values)
    for key, value in old.items():
        if isinstance(value, dict):
            values[key] = _shrunk_nested(_of_layers(value, chosen), factor)
        elif isinstance(value, int) and not isinstance(value, bool):
            values[key] = _number(key, value, factor, len(chosen))
        elif isinstance(value, list):
            values[key] = _listed(key, value, chosen, length, factor)
        elif isinstance(value, str) and len(value) == length and key.endswith("pattern"):
            values[key] = "".join(value[index] for index in chosen)
    _keep_products(values, old, factor)


def _of_layers(values: dict[Any, Any], chosen: list[int]) -> dict[Any, Any]:
    """Options by layer number, for the chosen layers."""
    if not values or not all(str(name).isdigit() for name in values):
        return values
    return {chosen.index(int(name)): part for name, part in values.items() if int(name) in chosen}


def _keep_products(values: dict[str, Any], old: dict[str, Any], factor: int) -> None:
    """Sizes that are products of others, and counts that others bound."""
    if isinstance(old.get("expand"), int) and old.get("intermediate_size") == old["expand"] * old["hidden_size"]:
        # In state-space models it is no width of neurons but that of the mixer.
        values["intermediate_size"] = values["expand"] * values["hidden_size"]
    if isinstance(values.get("mamba_n_heads"), int) and old["mamba_d_head"] < factor:
        # Heads too small to shrink: there are fewer of them then.
        values["mamba_n_heads"] = max(1, values["mamba_n_heads"] // factor)
    for key in _EXPERTS_READ:
        if isinstance(values.get(key), int):
            values[key] = min(values[key], EXPERTS // 2)
    if values.get("n_group") or values.get("topk_group"):
        values |= {"n_group": 1, "topk_group": 1}


def _shrunk_nested(values: dict[Any, Any], factor: int) -> dict[Any, Any]:
    shrunk = {}
    for key, value in values.items():
        shrunk[key] = value
        if isinstance(value, dict):
            shrunk[key] = _shrunk_nested(value, factor)
        elif isinstance(value, int) and not isinstance(value, bool):
            shrunk[key] = _number(str(key), value, factor, LAYERS)
        elif key == "mrope_section" and isinstance(value, list):
            shrunk[key] = _sections(value, factor)
    return shrunk


def _sections(values: list[int], factor: int) -> list[int]:
    """Parts of a head's rotations, which have to add up to half of it."""
    whole = max(len(values), sum(values) // factor)
    parts = [max(1, value // factor) for value in values]
    parts[0] += whole - sum(parts)
    return parts


def _number(key: str, value: int, factor: int, layers: int) -> int:
    """What becomes of a number, by what its key means; counts and options stay."""
    most = _MOST.get(key)
    if key in _COUNTS_OF_LAYERS:
        return layers
    if most is not None:
        return min(value, most)
    if key.startswith("vocab_size"):
        return VOCABULARY
    if key.endswith(("_period", "_interval")):
        return min(value, 2)
    if key.endswith("_offset"):
        return min(value, 1)
    if key in _KEPT or value < factor:
        return value
    if "intermediate_size" in key or key in ("ffn_dim", "ffn_hidden_size"):
        inner = min(max(1, value // factor), INNER)
        # Grouped products over experts want rows of a multiple of 16 bytes.
        return max(8, inner - inner % 8) if key.startswith("moe_") else inner
    return max(1, value // factor) if key in _MORE_SIZES or key.endswith(_SIZES) else value


def _listed(key: str, values: list[Any], chosen: list[int], length: int, factor: int) -> list[Any]:
    if key == "mrope_section":
        return _sections(values, factor)
    if _names_layers(key, values, length):
        return sorted({chosen.index(value) for value in values if value in chosen})
    return [values[index] for index in chosen] if len(values) == length else values


def _names_layers(key: str, values: list[Any], length: int) -> bool:
    """Whether a list holds numbers of layers, not one value for each layer."""
    numbers = all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < length for value in values)
    return numbers and len({*values}) == len(values) and key.endswith(_LISTS_OF_LAYERS)


def _layers(values: dict[str, Any], length: int) -> list[int]:
    """A few layers that are of every kind that the configuration lists, in order."""
    marks = [set(v) for k, v in values.items() if isinstance(v, list) and v and _names_layers(k, v, length)]
    lists = [
        v for k, v in values.items() if isinstance(v, list) and len(v) == length and not _names_layers(k, v, length)
    ]
    patterns = [v for k, v in values.items() if isinstance(v, str) and len(v) == length and k.endswith("pattern")]
    seen: dict[str, int] = {}
    for index in range(length):
        kind = repr([value[index] for value in lists]) + repr([value[index] for value in patterns])
        kind += repr([index in mark for mark in marks])
        seen.setdefault(kind, index)
    chosen = sorted(seen.values())
    for index in range(length):
        if len(chosen) >= min(LAYERS, length):
            break
        if index not in chosen:
            chosen.append(index)
    return sorted(chosen)


def _shrink_tower(values: dict[str, Any], old_width: int, width: int) -> None:
    """A tower for images or sound: two layers, two heads."""
    tower_width, heads = _value(values, _WIDTHS), _value(values, _HEADS)
    head = tower_width // heads if tower_width and heads else 64
    # Heads stay as many as they are, and four numbers wide or a little more.
    factor = next((one for one in range(max(1, head // 4), 0, -1) if head % one == 0), 1)
    length = _value(values, _DEPTHS)
    for key, value in list(values.items()):
        if isinstance(value, dict):
            _shrink_tower(value, old_width, width)
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int) and value == old_width and key not in _WIDTHS:
            values[key] = width
        elif isinstance(value, int) and key in _DEPTHS:
            values[key] = min(value, LAYERS)
        elif isinstance(value, int):
            values[key] = _number(key, value, factor, LAYERS)
        elif isinstance(value, list) and len(value) == length and length:
            values[key] = value[:LAYERS]
        elif isinstance(value, list) and key.endswith(("_indexes", "_indices", "_layers")):
            values[key] = list(range(min(len(value), LAYERS)))


def _name_tokens(values: dict[str, Any]) -> None:
    """Give every special token an id inside the small vocabulary, and each its own."""
    ids = iter(range(1, VOCABULARY))
    for part in (values, *(value for value in values.values() if isinstance(value, dict))):
        for key, value in part.items():
            if not str(key).endswith(("_token_id", "_token_index")):
                continue
            if isinstance(value, list):
                part[key] = [next(ids) for _ in value]
            elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                part[key] = next(ids)


def inputs_of(model: Any, seed: int = 0, length: int = 24, rows: int = 2) -> dict[str, Any]:
    """Random words for a small copy; ids of special tokens are left out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY // 2, VOCABULARY - 4, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
