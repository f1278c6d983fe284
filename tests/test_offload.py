"""A model whose layers are partly on disk, on meta between forwards, measures and edits nothing otherwise than a whole one."""

import copy

import pytest
import torch
from accelerate import dispatch_model
from device_scenarios import SCENARIOS, leaves
from excise.artifacts.events import Events
from excise.editing.errors import ExciseError
from excise.recipes.common.trainer import Schedule, fit
from helpers import make_pico
from test_devices import _near, outcome
from torch import nn

MEASURED = ("measurements", "suites", "inference", "searched", "streams")


def offloaded(model, folder):
    """The same model with the upper half of its layers, its last norm and its head on disk."""
    places = {"lm_head": "cpu" if model.config.tie_word_embeddings else "disk"}
    for name, module in model.base_model.named_children():
        if isinstance(module, nn.ModuleList):
            places |= {f"model.{name}.{n}": "disk" if 2 * n >= len(module) else "cpu" for n in range(len(module))}
        else:
            places[f"model.{name}"] = "disk" if name == "norm" else "cpu"
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("scenario", MEASURED)
def test_measuring_an_offloaded_model_equals_measuring_the_whole(scenario, tmp_path):
    count = iter(range(1000))

    def place(value):
        if not hasattr(value, "get_output_embeddings"):
            return value
        # With an unembedding of its own, which is on disk too.
        value.config.tie_word_embeddings = False
        value.lm_head.weight = nn.Parameter(value.lm_head.weight.detach().clone())
        return offloaded(value, tmp_path / f"{next(count)}")

    with torch.no_grad():
        expected, made = outcome(scenario, None), SCENARIOS[scenario](place)
    for before, after in zip(expected[:2], made, strict=True):
        assert all(_near(one, other) for one, other in zip(before, leaves(after), strict=True))


def test_an_offloaded_model_is_on_meta_between_forwards_and_is_not_trained(tmp_path):
    model = offloaded(copy.deepcopy(make_pico("llama")), tmp_path / "weights")
    assert any(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(ExciseError, match="cannot be trained"), Events().stage("train") as stage:
        fit(model, [{"x": 1}], stage, tmp_path, lambda *_: {}, Schedule(1, 1, 0.1, 0))
