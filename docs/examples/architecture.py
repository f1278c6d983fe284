"""A new architecture: one row. Here: Llama under a model type of its own, as a fork of it would have.

python docs/examples/architecture.py
"""

import torch
from excise.editing.architectures import ARCHITECTURES
from excise.editing.edits.base import edit_model
from excise.editing.edits.subspace_removal import Edit
from excise.editing.wiring.row import Architecture, Writer, classify
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class ForkConfig(LlamaConfig):
    model_type = "llama_fork"


class ForkForCausalLM(LlamaForCausalLM):
    config_class = ForkConfig


AutoConfig.register("llama_fork", ForkConfig)
AutoModelForCausalLM.register(ForkConfig, ForkForCausalLM)

LAYER = "model.layers.{layer}."
ARCHITECTURES["llama_fork"] = Architecture(
    # What writes to the stream, with the axis that has its width: -2 for nn.Linear [out, in], -1 for rows of tokens.
    writers=(
        Writer("model.embed_tokens.weight", -1, "embedding"),
        Writer(LAYER + "self_attn.o_proj.weight", -2, "attention"),
        Writer(LAYER + "mlp.down_proj.weight", -2, "mlp"),
    ),
    # Every other tensor of a checkpoint: it reads the stream, gates it, or normalizes it.
    readers=(
        "lm_head.weight",
        "model.norm.weight",
        LAYER + "input_layernorm.weight",
        LAYER + "post_attention_layernorm.weight",
        *(LAYER + f"self_attn.{name}_proj.weight" for name in "qkv"),
        *(LAYER + f"mlp.{name}_proj.weight" for name in ("gate", "up")),
    ),
    embedding="model.embed_tokens.weight",
    layers="model.layers",
    sublayers=("self_attn", "mlp"),
)

torch.manual_seed(0)
config = ForkConfig(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)
model = ForkForCausalLM(config).eval()
sites = classify(ARCHITECTURES["llama_fork"], list(model.state_dict()))
direction = torch.nn.functional.normalize(torch.randn(32, 1), dim=0)

token = {"input_ids": torch.tensor([[5, 9, 7, 3]])}
before = model(**token, output_hidden_states=True).hidden_states[1] @ direction
edit_model(Edit(direction, "llama_fork", layer_strengths=(1.0, 1.0)), model, config.to_dict())
after = model(**token, output_hidden_states=True).hidden_states[1] @ direction
print(
    f"{len(sites)} tensors write to the stream; along the direction: {before.abs().max():.3f} before,"
    f" {after.abs().max():.1e} after"
)
assert before.abs().max() > 0.01 > 1e-5 > after.abs().max()
