"""Sequences and a model that tests of the unlearning methods share."""

import torch
from excise.recipes.common.examples import Example
from helpers import make_pico
from peft import LoraConfig, get_peft_model

# Prompt and answer of unequal lengths: a mean over tokens is then no mean over sequences.
FORGET = [Example((5, 9, 7, 3, 11), 2), Example((4, 8, 2), 2), Example((12, 40, 41, 42, 43, 44, 45), 3)]
RETAIN = [Example((30, 31, 32), 1), Example((50, 51, 52, 53, 54, 55), 4), Example((60, 61, 62, 63), 1)]


def adapted():
    """A model whose adapter does something."""
    base = make_pico("llama")
    base.set_attn_implementation("sdpa")
    model = get_peft_model(base, LoraConfig(target_modules=["down_proj", "q_proj"], r=2))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model
