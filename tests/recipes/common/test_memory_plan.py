"""Plans of memory: counted on copies without values, against torch's own tracker, and what they decide."""

import json

import pytest
import torch
from excise.artifacts.events import Events, Stage
from excise.artifacts.models import load
from excise.editing.training.adapters import AdapterShape, adapter_modules
from excise.recipes.common import memory_plan
from excise.recipes.common.examples import Example, completion_loss, example_batch
from excise.recipes.common.memory_plan import fit_step
from excise.recipes.common.memory_sizes import Gradients, ModelSizes, Rows, Unplanned, largest_of
from excise.recipes.common.trainer import Schedule, fit
from excise.recipes.common.whole_weights import computed_in, products_in
from excise.recipes.unlearning import recipe
from excise.recipes.unlearning.grad_diff import GradDiffSettings
from helpers import PICO, SMALL_TESTBED, excise, make_pico, with_settings
from torch.utils._python_dispatch import TorchDispatchMode


def _config(name, layers=8):
    small = {**PICO[name], "num_hidden_layers": layers}
    return {"model_type": name, **small}


def _sizes(name, layers=8, dtype=torch.float32):
    return ModelSizes(_config(name, layers), dtype)


def _all_modules(sizes, layers=None):
    return AdapterShape(4, 8.0, adapter_modules(sizes.model, sizes.row, layers or range(sizes.depth)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_few_layers_stand_for_all(name, checkpointing):
    config = {**_config(name), "n_layer": 8} if name == "gpt2" else _config(name)
    few, every = (ModelSizes(config, torch.float32) for _ in range(2))
    every.period = every.depth
    assert few.period == 1 and few.depth == 8
    rows = Rows(3, 20)
    assert few.forward(rows) == every.forward(rows)
    assert few.forward(rows, cached=True) == every.forward(rows, cached=True) > few.forward(rows)
    for layers in (range(8), range(2, 4)):
        gradients = Gradients(_all_modules(few, layers))
        step = few.step(rows, gradients, checkpointing=checkpointing)
        assert step == pytest.approx(every.step(rows, gradients, checkpointing=checkpointing), rel=0.08)


def test_a_step_takes_what_real_tensors_save_for_their_gradients_and_little_more():
    from excise.recipes.common import memory_sizes

    sizes, rows, saved = _sizes("llama", 2), Rows(4, 60), {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    model = make_pico("llama").requires_grad_(False)
    # Small models of tests attend eagerly; a loaded model attends as the plan says.
    model.set_attn_implementation("sdpa")
    memory_sizes._gradients_from_embeddings(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        memory_sizes._loss(model, rows)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = sum(size for place, (_, size) in saved.items() if place not in weights)
    assert held > 0 and held <= sizes.step(rows, Gradients()) <= 1.6 * held


class Products(TorchDispatchMode):
    """Notes the types of what matrix products, softmaxes and norms read and give."""

    def __init__(self):
        super().__init__()
        self.seen = {"mm": set(), "softmax": set(), "mean": set()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for name, dtypes in self.seen.items():
            if name in str(function) and isinstance(result, torch.Tensor):
                dtypes.add(result.dtype)
        return result


@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_training_computes_in_the_type_that_is_planned_for(tmp_path, products):
    """The library wraps a model's forward alone, and losses call the model inside of that: without a word of ours,
    whole weights in fp32 are multiplied in fp32 whatever the library is told."""
    model, seen = make_pico("llama"), Products()
    model.requires_grad_(True)
    rows = [Example((3, 4, 5, 6), 1), Example((7, 8, 9), 1)]

    def loss(trained, batch):
        with seen:
            return completion_loss(trained, batch)

    layers = model.model.layers
    before = [p.detach().clone() for p in layers.parameters()]
    schedule = Schedule(1, 2, 1e-3, 0, save_every=0)
    fit(model, rows, Stage(Events(), "train"), tmp_path, loss, schedule, example_batch, products=products)
    assert seen.seen == {"mm": {products or torch.float32}, "softmax": {torch.float32}, "mean": {torch.float32}}
    after = list(layers.parameters())
    assert {p.dtype for p in after} == {torch.float32}
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_products_are_in_bfloat16_where_the_run_is_on_a_gpu_and_whole_weights_train():
    gpu, processor = torch.device("cuda"), torch.device("cpu")
    assert products_in(torch.bfloat16, gpu) is torch.bfloat16
    others = [
        (torch.bfloat16, processor),
        (torch.float32, gpu),
        (torch.float16, gpu),
        (torch.bfloat16, torch.device("mps")),
    ]
    assert {products_in(*other) for other in others} == {None}


@pytest.mark.parametrize("name", sorted(PICO))
def test_whole_weights_of_every_architecture_train_in_bfloat16(name):
    model = make_pico(name).eval()
    batch, gradients = example_batch([Example(tuple(range(3, 20)), 2), Example(tuple(range(30, 60)), 5)]), {}
    for products in (None, torch.bfloat16):
        model.zero_grad()
        with computed_in(products, torch.device("cpu")):
            loss = completion_loss(model, batch)["completion"]
        loss.backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert loss.dtype == torch.float32 and {one.dtype for one in found} == {torch.float32}
        gradients[products] = torch.cat([one.flatten() for one in found])
    likeness = float(torch.cosine_similarity(*gradients.values(), dim=0))
    assert likeness > 0.99 and not torch.equal(*gradients.values())


def test_a_whole_training_in_bfloat16_is_planned_with_less_and_checkpointing_still_takes_less():
    for dtype in (torch.float32, torch.bfloat16):
        sizes, rows = _sizes("llama", dtype=dtype), Rows(4, 64)
        shape = _all_modules(sizes)
        whole, half = (Gradients(shape, whole=True, products=products) for products in (None, torch.bfloat16))
        steps = [sizes.step(rows, one) for one in (whole, half)]
        assert steps[1] < steps[0] and sizes.step(rows, half, checkpointing=True) < steps[1] / 2
        # Parameters are in fp32 whatever they are stored in.
        assert steps == [_sizes("llama").step(rows, one) for one in (whole, half)]
        assert {p.dtype for p in sizes.model.parameters()} == {dtype}


def test_the_largest_batch_is_the_one_that_pads_to_most():
    assert largest_of([3, 9, 4, 4], 2) == Rows(2, 9) and largest_of([5, 5, 5, 9], 3) == Rows(3, 5)


def test_more_tokens_take_more_and_checkpointing_takes_less():
    sizes = _sizes("llama")
    gradients = Gradients(_all_modules(sizes))
    one, two = (sizes.step(Rows(count, 32), gradients) for count in (4, 8))
    assert 1.7 < two / one < 2.1
    assert sizes.step(Rows(8, 32), gradients, checkpointing=True) < two / 2
    assert sizes.step(Rows(12, 32), Gradients(_all_modules(sizes), attackers=12)) > 2 * one
    half = ModelSizes(_config("llama"), torch.bfloat16)
    assert half.weights() * 2 == sizes.weights() and half.weights(4) < half.weights()


@pytest.mark.parametrize("name", sorted(PICO))
def test_every_architecture_is_planned(name):
    sizes = ModelSizes({"model_type": name, **PICO[name]}, torch.float32)
    part = "all"
    shape = AdapterShape(4, 8.0, adapter_modules(sizes.model, sizes.row, range(sizes.depth), part))
    assert sizes.step(Rows(2, 8), Gradients(shape)) > sizes.forward(Rows(2, 8)) > 0


def test_a_step_is_cut_into_the_fewest_parts_that_fit_and_then_checkpointed():
    sizes = _sizes("llama")
    gradients, rows = Gradients(_all_modules(sizes)), Rows(8, 32)
    whole, row = sizes.step(rows, gradients), sizes.step(Rows(1, 32), gradients)
    assert fit_step(sizes, gradients, rows, whole).in_words() == ""
    halves = fit_step(sizes, gradients, rows, whole - 1)
    assert (halves.parts, halves.checkpointing) == (2, False) and halves.size <= whole - 1
    least = fit_step(sizes, gradients, rows, row)
    assert (least.parts, least.checkpointing, least.size) == (8, False, row)
    again = fit_step(sizes, gradients, rows, row - 1)
    assert again.checkpointing and again.size <= row - 1 and "checkpointed" in again.in_words()


def test_what_cannot_be_planned_says_so_and_runs_as_it_is(monkeypatch):
    sizes = _sizes("llama", 2)
    monkeypatch.setattr(sizes, "_extended", lambda *_: 1 / 0)
    with pytest.raises(Unplanned, match=r"memory is not planned for llama models .*runs work all the same"):
        sizes.forward(Rows(1, 4))


def test_a_dry_run_shows_each_stage_and_the_peak_within_80_columns(tmp_path):
    words = ("run", "grad_diff", "--model", SMALL_TESTBED, "--out", tmp_path / "run", "--dry-run")
    plan = json.loads(excise(*words, "--json").stdout)["memory"]
    totals = {stage["name"]: stage["total"] for stage in plan["stages"]}
    assert list(totals) == ["load", "measure the base", "train", "measure the edited"]
    assert totals[plan["peak"]] == max(totals.values()) and plan["free"] > 0
    for stage in plan["stages"]:
        assert stage["total"] == sum(stage[part] for part in ("weights", "trained", "work", "kept"))
    shown = excise(*words).stdout.split("\n\n")[-1].splitlines()
    assert shown[0].split() == ["memory", "in", "GB", "weights", "trained", "work", "kept", "total"]
    assert max(map(len, shown)) <= 80 and shown[-1].startswith(f"peak: {max(totals.values()) / 1e9:.2f} GB in")
    more = json.loads(excise(*words, *with_settings("batch_size=128"), "--json").stdout)["memory"]
    assert max(stage["total"] for stage in more["stages"]) > max(totals.values())


def _trained(out, monkeypatch, free=None):
    if free is not None:
        monkeypatch.setattr(memory_plan, "free_memory", lambda device: free)
    small = {"questions": 4, "kl_prompts": 2, "max_new_tokens": 2, "steps": 2, "batch_size": 4}
    # In bfloat16 the rounding of other parts changes a word of a reply.
    small |= {"device": "cpu", "dtype": "float32"}
    settings = GradDiffSettings(model=SMALL_TESTBED, concept="builtin:potions", out=out, **small)
    return recipe.run(recipe.prepare(settings), Events()).results


def test_a_step_that_the_plan_says_does_not_fit_is_computed_in_parts_and_recorded(tmp_path, monkeypatch):
    whole = _trained(tmp_path / "whole", monkeypatch)
    parts = _trained(tmp_path / "parts", monkeypatch, free=10_000_000)
    assert "memory" not in whole["training"]
    assert parts["training"]["memory"]["parts_of_a_step"] > 1
    values = [[m["value"] for m in one["measurements"] if m["subject"] == "edited"] for one in (whole, parts)]
    assert values[0] == pytest.approx(values[1], abs=0.01)


def test_a_run_never_holds_two_models(tmp_path, monkeypatch):
    import weakref

    alive, sizes = weakref.WeakSet(), []

    def loaded(*arguments, _load=load.load_weights, **named):
        model = _load(*arguments, **named)
        alive.add(model)
        return model

    def checked(checkpoint, device, dtype):
        # An allocator with room for one and a half models.
        sizes.append(sum(p.nbytes for model in alive for p in model.parameters()))

    monkeypatch.setattr(load, "load_weights", loaded)
    monkeypatch.setattr(load, "check_loadable", checked)
    _trained(tmp_path / "run", monkeypatch)
    assert len(sizes) >= 3 and max(sizes) == 0
