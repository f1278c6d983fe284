"""The base's dropout, skipped layers and router noise are off while something is trained, and on again afterwards."""

import pytest
import torch
from excise.artifacts.events import Events
from excise.editing.training.dropout import without_dropout
from excise.recipes.common.trainer import Schedule, fit
from helpers import PICO
from transformers import AutoConfig, AutoModelForCausalLM

INPUTS = {"input_ids": torch.tensor([[5, 9, 7, 3, 11]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
NOISY = {
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5, "layerdrop": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "llama": {"attention_dropout": 0.5},
    "phi3": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5},
    "gemma2": {"attention_dropout": 0.5},
    "starcoder2": {"residual_dropout": 0.5, "embedding_dropout": 0.5, "attention_dropout": 0.5},
    "mixtral": {"attention_dropout": 0.5, "router_jitter_noise": 0.5},
}


def _noisy(name, attention="eager"):
    torch.manual_seed(0)
    # Gemma 2 has no other attention.
    attention = "eager" if name == "gemma2" else attention
    config = AutoConfig.for_model(name, **{**PICO[name], **NOISY[name]})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NOISY)
@torch.no_grad()
def test_in_training_mode_a_model_then_computes_what_it_computes_in_evaluation(name, attention):
    model = _noisy(name, attention)
    wanted = model.eval()(**INPUTS).logits
    model.train()
    with without_dropout(model):
        assert model.training and torch.allclose(model(**INPUTS).logits, wanted, atol=1e-6)
    # The noise is there without it, and is back.
    assert max(float((model(**INPUTS).logits - wanted).abs().max()) for _ in range(5)) > 1e-4
    assert all(getattr(model.config, key) == rate for key, rate in NOISY[name].items())


def test_rates_are_back_after_an_error():
    model = _noisy("gpt2")
    with pytest.raises(KeyError), without_dropout(model):
        assert model.transformer.drop.p == 0
        raise KeyError
    assert model.transformer.drop.p == 0.5


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_every_gradient_step_sees_the_model_without_its_noise(name, tmp_path):
    model, seen = _noisy(name), []
    with torch.no_grad():
        wanted = model.eval()(**INPUTS).logits

    def loss(trained, batch):
        logits = trained(**INPUTS).logits
        if not seen:
            seen.append(logits.detach().clone())
        return {"loss": logits.square().mean()}

    with Events().stage("train", 1) as stage:
        fit(model, [{"input_ids": torch.tensor([1])}] * 2, stage, tmp_path, loss, Schedule(1, 1, 1e-3, 0))
    # Where the processor multiplies bfloat16, training does; noise of one half changes far more than that rounds.
    assert torch.allclose(seen[0].float(), wanted, atol=1e-2)
    model.train()
    assert float((model(**INPUTS).logits - wanted).abs().max()) > 5e-2
