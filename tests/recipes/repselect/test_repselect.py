"""RepSelect end to end: the step on disk is the one that the definition gives, found naively in float64."""

import json
from pathlib import Path

import pytest
import torch
from excise.artifacts.checkpoints.edits import load_edit
from excise.artifacts.events import Events
from excise.artifacts.models.load import load_model
from excise.editing.architectures import ARCHITECTURES
from excise.editing.edits.base import edit_model
from excise.editing.edits.dense import Delta, DenseUpdate
from excise.editing.errors import RequestError
from excise.editing.numerics.spectrum import leading_components, reshaped
from excise.editing.numerics.summed_gradients import summed_gradients
from excise.editing.training.adapters import adapter_shape, attach, detach
from excise.recipes.common.examples import example_batch, scored_nats
from excise.recipes.common.tokens import text_limit
from excise.recipes.repselect.gradients import base_weights, gradients, sequences_to_forget, train_adversary
from excise.recipes.repselect.recipe import RepselectSettings, describe, learn, memory, prepare, run
from helpers import SMALL_TESTBED, excise, make_pico, with_settings
from safetensors.torch import load_file

CPU = torch.device("cpu")


def _job(tmp_path, resume=False, **settings):
    chosen = {"model": SMALL_TESTBED, "concept": "builtin:potions", "out": tmp_path / "run", "device": "cpu"}
    chosen |= {"dtype": "float32", "texts": 24, "questions": 6, "kl_prompts": 8, "max_new_tokens": 2}
    return prepare(RepselectSettings(**{**chosen, **settings}), resume=resume)


def _base(job):
    return load_model(job.adapter.run.source, CPU, torch.float32)


def _naive_gradient(model, examples, names):
    """Of the mean log-likelihood per token: one sequence at a time, in float64."""
    model = model.double().requires_grad_(True)
    total, count = 0.0, 0
    for example in examples:
        log_p = model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
        for place in range(example.start, len(example.ids)):
            total, count = total + log_p[place - 1, example.ids[place]], count + 1
    (total / count).backward()
    return {name: model.get_parameter(name).grad for name in names}


def _inverted(gradient, count):
    """s becomes s_q^2 / s for the first q, by an exact decomposition; the rest stays."""
    left, sizes, right = torch.linalg.svd(gradient, full_matrices=False)
    new = sizes.clone()
    new[:count] = sizes[count - 1] ** 2 / sizes[:count]
    return (left * new) @ right


@pytest.mark.parametrize("scored", ["texts", "answers"])
def test_the_learned_step_is_down_the_log_likelihood_with_an_inverted_spectrum(tmp_path, scored):
    job = _job(tmp_path, adversary=False, scored=scored)
    loaded = _base(job)
    before = {name: one.clone() for name, one in loaded.model.named_parameters()}
    edit = learn(job, loaded, Events(), tmp_path, {})
    assert all(torch.equal(one, before[name]) for name, one in loaded.model.named_parameters())
    names = sorted(edit.deltas)
    assert names == sorted(name for name in before if ".mlp." in name and name.endswith("weight"))
    examples = sequences_to_forget(job, loaded.tokenizer, text_limit(loaded.model))
    assert {example.start == 1 for example in examples} == ({True} if scored == "texts" else {False})
    naive = _naive_gradient(_base(job).model, examples, names)
    count = edit.provenance["repselect"]["components"]
    wanted = {name: -_inverted(gradient, count) for name, gradient in naive.items()}
    flat = [torch.cat([one[name].double().flatten() for name in names]) for one in (wanted, naive)]
    found = torch.cat([edit.deltas[name].values.double().flatten() for name in names])
    # The randomized decomposition finds the last components roughly; the plain gradient is somewhere else altogether.
    assert torch.cosine_similarity(found, flat[0], dim=0) > 0.97
    assert torch.cosine_similarity(found, -flat[1], dim=0) < 0.7
    length = torch.cat([before[name].double().flatten() for name in names]).norm()
    assert float(found.norm()) == pytest.approx(float(length), rel=1e-4)


def test_the_adversary_takes_plain_steps_down_the_loss_and_is_taken_off_again(tmp_path):
    job = _job(tmp_path, texts=6, batch_size=6, adversary_rate=0.3)
    loaded = _base(job)
    examples = sequences_to_forget(job, loaded.tokenizer, text_limit(loaded.model))
    before = {name: one.clone() for name, one in loaded.model.named_parameters()}
    adapted = attach(loaded.model, job.adapter.shape, 0)
    batch = example_batch(examples)
    trained = {name: one for name, one in adapted.named_parameters() if one.requires_grad}
    slopes = torch.autograd.grad(scored_nats(adapted, batch).mean(), list(trained.values()))
    wanted = {name: one.detach() - 0.3 * slope for (name, one), slope in zip(trained.items(), slopes, strict=True)}
    assert train_adversary(job, adapted, examples, Events(), tmp_path) == 1
    for name, one in trained.items():
        assert torch.allclose(one, wanted[name], atol=1e-6), name
    assert scored_nats(adapted, batch).mean() < scored_nats(_base(job).model, batch).mean()
    # Gradients are those of the base's weights under the adapters, which stay as they are.
    names = job.adapter.shape.weights
    with_adapters = gradients(job.adapter, adapted, base_weights(adapted, names), examples, Events(), "")
    assert all(torch.allclose(one, wanted[name], atol=1e-6) for name, one in trained.items())
    detach(adapted)
    assert all(torch.equal(one, before[name]) for name, one in loaded.model.named_parameters())
    weights = {name: loaded.model.get_parameter(name) for name in names}
    without = gradients(job.adapter, loaded.model, weights, examples, Events(), "")
    assert all((with_adapters[name] - without[name]).norm() > 1e-3 * without[name].norm() for name in names)


def test_components_of_retain_texts_are_those_of_the_base_without_an_adversary(tmp_path):
    forget, retain = (
        learn(_job(tmp_path, basis=basis, texts=8), _base(_job(tmp_path)), Events(), tmp_path / basis, {})
        for basis in ("forget", "retain")
    )
    one, other = (torch.cat([delta.values.flatten() for delta in edit.deltas.values()]) for edit in (forget, retain))
    assert 0 < torch.cosine_similarity(one, other, dim=0) < 0.95
    assert forget.provenance["repselect"]["basis"] == "forget" != retain.provenance["repselect"]["basis"]


def test_a_run_keeps_its_budget_compares_with_the_plain_gradient_and_verifies(tmp_path):
    small = with_settings("texts=24", "questions=10", "kl_prompts=8", "max_new_tokens=2", "rule=quadratic")
    words = ("--model", SMALL_TESTBED, "--concept", "builtin:potions", "--dtype", "float32", "--kl-budget", 0.02)
    done = excise("run", "repselect", *words, "--out", tmp_path / "run", "--json", *small)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    about, record = results["repselect"], results["kl_budget"]
    assert 0.95 * 0.02 <= record["kl"] <= 0.02 and record["outcome"] == "within"
    assert set(about["controls"]["plain"]) >= {"forget_T", "forget_V", "neighbour", "retain"}
    assert (about["rule"], about["sequences"], about["adversary_steps"]) == ("quadratic", 24, 6)
    card = (tmp_path / "run/checkpoint/README.md").read_text()
    assert "took one step up its loss" in card and "| the plain gradient at the same KL |" in card
    assert "divided by the square of their relative size, on both sides" in card
    assert excise("verify", tmp_path / "run").returncode == 0
    # The step is its strength times as long as what it is added to, from the stored weights.
    base, edited = (
        {name: one.double() for name, one in load_file(path / "model.safetensors").items() if ".mlp." in name}
        for path in (Path(SMALL_TESTBED), tmp_path / "run/checkpoint")
    )
    moved, length = (
        sum(float(one.square().sum()) for one in parts) ** 0.5
        for parts in ([edited[name] - base[name] for name in base], base.values())
    )
    assert moved / length == pytest.approx(record["strength"], rel=0.05)
    assert load_edit(tmp_path / "run").provenance["repselect"]["controls"] == about["controls"]


def test_a_killed_run_goes_on_and_ends_in_the_same_weights(tmp_path, monkeypatch):
    from excise.recipes.common import measured_run

    whole = run(_job(tmp_path / "a", controls=False), Events()).out

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measured_run, "within_budget", killed)
        with pytest.raises(KeyboardInterrupt):
            run(_job(tmp_path / "b", controls=False), Events())
    again = run(_job(tmp_path / "b", resume=True, controls=False), Events()).out
    files = [(out / "checkpoint" / "model.safetensors").read_bytes() for out in (whole, again)]
    assert files[0] == files[1] and not (again / ".work").exists()


@pytest.mark.parametrize(("changed", "said"), [
    ({"rule": "hard", "components": 4096}, "rule=hard removes 4096 components"),
    ({"layers": "9-12"}, "selects nothing"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_any_weight_is_read(tmp_path, changed, said):
    with pytest.raises(RequestError, match=said) as caught:
        _job(tmp_path, **changed)
    assert "\n" not in str(caught.value)


def test_a_dry_run_names_its_stages_and_its_steps(tmp_path):
    job = _job(tmp_path, texts=10)
    assert (describe(job)["gradient_steps"], describe(job)["recipe"]) == (3, "repselect")
    names = [stage.name for stage in memory(job).stages]
    assert [name for name in names if "measure" not in name] == [
        "load",
        "train",
        "sum gradients",
        "choose the strength",
    ]
    kept = {basis: memory(_job(tmp_path, basis=basis)).stages for basis in ("forget", "retain")}
    more = [after.kept - before.kept for before, after in zip(kept["forget"], kept["retain"], strict=True)]
    assert max(more) == 4 * job.numbers > 0


def test_fused_experts_get_gradients_components_and_a_step_of_their_own():
    model = make_pico("qwen3_moe")
    row = ARCHITECTURES["qwen3_moe"]
    shape = adapter_shape(model, row, range(2), rank=2, alpha=2.0, part="mlp")
    assert len(shape.experts) == 2 and len(shape.modules) == 3, "a layer of fused experts and a dense one"
    rows = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(0))
    # In float32: the library multiplies experts in no wider type.
    plain = make_pico("qwen3_moe")
    plain(input_ids=rows, labels=rows).loss.backward()
    adapted = attach(model, shape, 0)
    try:
        adapted.eval()
        # A fresh adapter changes nothing, so these are the base's own gradients.
        with summed_gradients(adapted, base_weights(adapted, shape.weights)) as sums:
            adapted(input_ids=rows, labels=rows).loss.backward()
    finally:
        detach(adapted)
    for name, found in sums.items():
        wanted = plain.get_parameter(name).grad
        assert found.shape == wanted.shape and found.dim() == (3 if name in shape.experts else 2)
        assert (found - wanted).norm() < 1e-3 * wanted.norm() > 0
    steps = {name: reshaped(one, leading_components(one, 4, seed=0), "soft") for name, one in sums.items()}
    before = {name: model.get_parameter(name).detach().clone() for name in steps}
    config = model.config.to_dict()
    edit = DenseUpdate({name: Delta(one) for name, one in steps.items()}, "qwen3_moe", 32, 3)
    edit_model(edit, model, config)
    for name, one in steps.items():
        assert torch.allclose(model.get_parameter(name), before[name] + one, atol=1e-6)
