"""The table of architectures: for each model type, which tensors write to the residual stream.

A row names every tensor of a checkpoint. A writer has the axis that holds d_model and, in post-norm models, the gain
between the matrix and the stream; all other tensors are readers. A tensor that matches no pattern is an error. Nothing
is inferred from shapes, because a shape is ambiguous when d_model equals another width.

Source of each row: the model's modeling file in transformers 5.23, and keys of saved checkpoints.
"""

import re
from typing import Any

from .errors import RequestError, UnsupportedArchitecture
from .wiring.row import Architecture, ExpertPart, FusedExperts, Kind, Writer

_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")


def _linear(pattern: str, kind: Kind, gain: str | None = None) -> tuple[Writer, Writer]:
    # A bias adds the same vector to every write, so the direction would stay in the stream if only the weight lost it.
    gains = (gain,) if gain else ()
    return Writer(pattern + ".weight", -2, kind, gains), Writer(pattern + ".bias", -1, kind, gains)


def _conv1d(pattern: str, kind: Kind) -> tuple[Writer, Writer]:
    return Writer(pattern + ".weight", -1, kind), Writer(pattern + ".bias", -1, kind)


def _wb(*names: str) -> tuple[str, ...]:
    """Weight and bias of each name."""
    return tuple(f"{name}.{part}" for name in names for part in ("weight", "bias"))


_LAYER = "model.layers.{layer}."
_EMBEDDING = Writer("model.embed_tokens.weight", -1, "embedding")
_READERS = (
    "lm_head.weight",
    "model.norm.weight",
    # Not a weight: a buffer that older versions of transformers saved.
    _LAYER + "self_attn.rotary_emb.inv_freq",
    _LAYER + "input_layernorm.weight",
    _LAYER + "post_attention_layernorm.weight",
    *_wb(*(_LAYER + f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))),
)
_DENSE = _wb(_LAYER + "mlp.gate_proj", _LAYER + "mlp.up_proj")
_QK_NORMS = (_LAYER + "self_attn.q_norm.weight", _LAYER + "self_attn.k_norm.weight")
_FEED_FORWARD_NORMS = (
    _LAYER + "pre_feedforward_layernorm.weight",
    _LAYER + "post_feedforward_layernorm.weight",
)


def _llama_like(
    *readers: str,
    experts: tuple[Writer, ...] = (),
    dense: bool = True,
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj"),
    fused: tuple[FusedExperts, ...] = (),
) -> Architecture:
    mlp = _linear(_LAYER + "mlp.down_proj", "mlp") if dense else ()
    return Architecture(
        writers=(_EMBEDDING, *_linear(_LAYER + "self_attn.o_proj", "attention"), *mlp, *experts),
        readers=(*_READERS, *(_DENSE if dense else ()), *readers),
        embedding=_EMBEDDING.pattern,
        layers="model.layers",
        sublayers=("self_attn", "mlp"),
        mlp_units=None if experts else "mlp.down_proj",
        mlp_inputs=mlp_inputs,
        fused=fused,
    )


def _post_norm(*readers: str, gain_offset: float) -> Architecture:
    """Gemma and OLMo 2 put a norm with a gain between each sublayer and the stream."""
    return Architecture(
        writers=(
            _EMBEDDING,
            *_linear(_LAYER + "self_attn.o_proj", "attention", _LAYER + "post_attention_layernorm.weight"),
            *_linear(_LAYER + "mlp.down_proj", "mlp", _LAYER + "post_feedforward_layernorm.weight"),
        ),
        readers=(*_READERS, *_DENSE, *_FEED_FORWARD_NORMS, *readers),
        embedding=_EMBEDDING.pattern,
        layers="model.layers",
        # The norm's output is what is added to the stream, so hooks sit on the norms.
        sublayers=("post_attention_layernorm", "post_feedforward_layernorm"),
        gain_offset=gain_offset,
    )


_FUSED_EXPERTS = Writer(_LAYER + "mlp.experts.down_proj", -2, "mlp")


def _one_by_one(expert: str, gate: str, up: str, down: str) -> tuple[FusedExperts, ...]:
    """Experts that are stored one by one and fused in memory, gate and up projection in one matrix."""
    names = [f"{_LAYER}{expert}.{{expert}}.{name}.weight" for name in (gate, up, down)]
    return (
        FusedExperts(
            _LAYER + "mlp.experts.gate_up_proj",
            (ExpertPart(names[0], index=0, of=2), ExpertPart(names[1], index=1, of=2)),
        ),
        FusedExperts(_LAYER + "mlp.experts.down_proj", (ExpertPart(names[2]),)),
    )


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _llama_like(),
    "mistral": _llama_like(),
    "qwen2": _llama_like(),
    "qwen3": _llama_like(*_QK_NORMS),
    "phi3": _llama_like(
        _LAYER + "self_attn.qkv_proj.weight", _LAYER + "mlp.gate_up_proj.weight", mlp_inputs=("mlp.gate_up_proj",)
    ),
    "gemma2": _post_norm(gain_offset=1.0),
    "gemma3_text": _post_norm(*_QK_NORMS, gain_offset=1.0),
    "olmo2": _post_norm(*_QK_NORMS, gain_offset=0.0),
    "mixtral": _llama_like(
        _LAYER + "block_sparse_moe.gate.weight",
        _LAYER + "block_sparse_moe.experts.{expert}.w1.weight",
        _LAYER + "block_sparse_moe.experts.{expert}.w3.weight",
        _LAYER + "mlp.gate.weight",
        _LAYER + "mlp.experts.gate_up_proj",
        # On disk one matrix an expert; in memory all experts of a layer in one [E, out, in] tensor.
        experts=(Writer(_LAYER + "block_sparse_moe.experts.{expert}.w2.weight", -2, "mlp"), _FUSED_EXPERTS),
        dense=False,
        fused=_one_by_one("block_sparse_moe.experts", "w1", "w3", "w2"),
    ),
    "qwen3_moe": _llama_like(
        *_QK_NORMS,
        _LAYER + "mlp.gate.weight",
        _LAYER + "mlp.experts.{expert}.gate_proj.weight",
        _LAYER + "mlp.experts.{expert}.up_proj.weight",
        _LAYER + "mlp.experts.gate_up_proj",
        # Layers listed in mlp_only_layers are dense, so both forms can stand in one checkpoint.
        experts=(Writer(_LAYER + "mlp.experts.{expert}.down_proj.weight", -2, "mlp"), _FUSED_EXPERTS),
        fused=_one_by_one("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    ),
    "gpt_oss": _llama_like(
        _LAYER + "self_attn.sinks",
        *_wb(_LAYER + "mlp.router"),
        _LAYER + "mlp.experts.gate_up_proj",
        _LAYER + "mlp.experts.gate_up_proj_bias",
        # [E, in, out], the other way round from Mixtral; both widths are 2880 in the released models.
        experts=(
            Writer(_LAYER + "mlp.experts.down_proj", -1, "mlp"),
            Writer(_LAYER + "mlp.experts.down_proj_bias", -1, "mlp"),
        ),
        dense=False,
        fused=tuple(
            FusedExperts(_LAYER + f"mlp.experts.{name}_proj", inputs_first=True) for name in ("gate_up", "down")
        ),
    ),
    "gpt2": Architecture(
        writers=(
            Writer("transformer.wte.weight", -1, "embedding"),
            Writer("transformer.wpe.weight", -1, "position"),
            *_conv1d("transformer.h.{layer}.attn.c_proj", "attention"),
            *_conv1d("transformer.h.{layer}.mlp.c_proj", "mlp"),
        ),
        readers=(
            "lm_head.weight",
            *_wb("transformer.ln_f"),
            *_wb(*(f"transformer.h.{{layer}}.{name}" for name in ("ln_1", "ln_2", "attn.c_attn", "mlp.c_fc"))),
            # Parts of the causal mask, which older versions of transformers saved as buffers.
            "transformer.h.{layer}.attn.bias",
            "transformer.h.{layer}.attn.masked_bias",
        ),
        embedding="transformer.wte.weight",
        layers="transformer.h",
        sublayers=("attn", "mlp"),
        attention_units="attn.c_proj",
        mlp_units="mlp.c_proj",
        mlp_inputs=("mlp.c_fc",),
        # GPT-2 as published has no prefix; saved again by transformers, it has one.
        spellings=(("transformer.", ""),),
    ),
    "gpt_neox": Architecture(
        writers=(
            Writer("gpt_neox.embed_in.weight", -1, "embedding"),
            *_linear("gpt_neox.layers.{layer}.attention.dense", "attention"),
            *_linear("gpt_neox.layers.{layer}.mlp.dense_4h_to_h", "mlp"),
        ),
        readers=(
            "embed_out.weight",
            "lm_head.weight",
            *_wb("gpt_neox.final_layer_norm"),
            *_wb(
                *(
                    f"gpt_neox.layers.{{layer}}.{name}"
                    for name in (
                        "input_layernorm",
                        "post_attention_layernorm",
                        "attention.query_key_value",
                        "mlp.dense_h_to_4h",
                    )
                )
            ),
            *(f"gpt_neox.layers.{{layer}}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")),
        ),
        embedding="gpt_neox.embed_in.weight",
        layers="gpt_neox.layers",
        sublayers=("attention", "mlp"),
        attention_units="attention.dense",
        mlp_units="mlp.dense_4h_to_h",
        mlp_inputs=("mlp.dense_h_to_4h",),
        unembedding="embed_out.weight",
    ),
    "starcoder2": Architecture(
        writers=(
            _EMBEDDING,
            *_linear(_LAYER + "self_attn.o_proj", "attention"),
            *_linear(_LAYER + "mlp.c_proj", "mlp"),
        ),
        readers=(
            *_READERS,
            # Layer norms, so they have biases.
            "model.norm.bias",
            _LAYER + "input_layernorm.bias",
            _LAYER + "post_attention_layernorm.bias",
            *_wb(_LAYER + "mlp.c_fc"),
        ),
        embedding=_EMBEDDING.pattern,
        layers="model.layers",
        sublayers=("self_attn", "mlp"),
        mlp_units="mlp.c_proj",
        mlp_inputs=("mlp.c_fc",),
    ),
    "opt": Architecture(
        writers=(
            Writer("model.decoder.embed_tokens.weight", -1, "embedding"),
            Writer("model.decoder.embed_positions.weight", -1, "position"),
            *_linear("model.decoder.layers.{layer}.self_attn.out_proj", "attention"),
            *_linear("model.decoder.layers.{layer}.fc2", "mlp"),
        ),
        readers=(
            "lm_head.weight",
            *_wb("model.decoder.final_layer_norm"),
            *_wb(
                *(
                    f"model.decoder.layers.{{layer}}.{name}"
                    for name in (
                        "self_attn.q_proj",
                        "self_attn.k_proj",
                        "self_attn.v_proj",
                        "self_attn_layer_norm",
                        "fc1",
                        "final_layer_norm",
                    )
                )
            ),
        ),
        embedding="model.decoder.embed_tokens.weight",
        layers="model.decoder.layers",
        # OPT has no module for its MLP: its second matrix writes to the stream itself.
        sublayers=("self_attn", "fc2"),
        attention_units="self_attn.out_proj",
        mlp_units="fc2",
        mlp_inputs=("fc1",),
        spellings=(("model.", ""),),
        refused=(
            (
                # OPT-350m is such a model.
                "do_layer_norm_before",
                False,
                "its norm acts on the stream itself, so no weight edit removes a direction",
            ),
        ),
    ),
}


def architecture_of(config: dict[str, Any]) -> Architecture:
    """Return the row for a model's ``config.json``.

    Raises:
        UnsupportedArchitecture: The model type has no row, its variant cannot be edited in weights,
            or the weights are stored quantized.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedArchitecture(
            f"config.json names no model_type (got {model_type!r:.40}); fetch the checkpoint again"
        )
    _refuse_quantized(config)
    row = ARCHITECTURES.get(model_type)
    if row is None:
        # Imported here: trying out a small copy needs transformers, and most models have a row.
        from .wiring.derived import derived_row

        return derived_row(config)
    for key, value, reason in row.refused:
        if config.get(key) == value:
            raise UnsupportedArchitecture(f"{model_type} with {key}={value} cannot be edited: {reason}")
    return row


def _refuse_quantized(config: dict[str, Any]) -> None:
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UnsupportedArchitecture(
            f"the checkpoint stores quantized weights ({method}); edit the full-precision checkpoint, then quantize"
        )


def residual_width(config: dict[str, Any]) -> int:
    """d_model, from ``config.json``."""
    return _size(config, ("hidden_size", "n_embd", "d_model"))


def layer_count(config: dict[str, Any]) -> int:
    """Number of decoder layers, from ``config.json``."""
    return _size(config, ("num_hidden_layers", "n_layer", "n_layers", "num_layers"))


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a ``config.json`` that describes the language model, in which models of several kinds nest it."""
    return next((config[key] for key in _TEXT_PARTS if isinstance(config.get(key), dict)), config)


def _size(config: dict[str, Any], keys: tuple[str, ...]) -> int:
    part = text_config(config)
    value = next((part[key] for key in keys if key in part), None)
    if value is None and (part is not config or str(config.get("model_type")) not in ARCHITECTURES):
        # A nested part leaves out what is the default of its class, and some types compute their depth.
        value = next((value for key in keys if (value := _default(config, key)) is not None), None)
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"config.json has no {keys[0]}, or it is no whole number; fetch the checkpoint again")
    return value


def _default(config: dict[str, Any], key: str) -> Any:
    from .wiring.small_copy import full_config

    return getattr(full_config(config).get_text_config(decoder=True), key, None)


def layer_selection(layers: str, count: int) -> list[int]:
    """Turn ``all``, ``3``, ``2-5`` or fractions of depth such as ``0.25-0.75`` into layer numbers.

    Raises:
        RequestError: The text is none of these, or lies outside the model.
    """
    if layers == "all":
        return list(range(count))
    # Few digits: a range of 10^12 layers would fill the memory before it was found to be too long.
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,9})?)(?:-([0-9]{1,6}(?:\.[0-9]{1,9})?))?", layers)
    if match:
        first, last = match[1], match[2] or match[1]
        # Fractions name boundaries between layers, so the last one is exclusive; a range of numbers includes its last
        # layer.
        if "." in first or "." in last:
            chosen = list(range(round(float(first) * count), round(float(last) * count)))
        else:
            chosen = list(range(int(first), int(last) + 1))
        if chosen and chosen[-1] < count:
            return chosen
    raise RequestError(
        f"layers={layers!r} selects nothing in a model of {count} layers; "
        f"give 'all', a number, a range such as 0-{count - 1}, or fractions of depth such as 0.25-0.75"
    )
