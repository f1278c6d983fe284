"""TAR's loss from its definition: float64, one sequence and one token at a time, AdamW written out."""

import copy
import math

import pytest
import torch
from excise.editing.architectures import ARCHITECTURES
from excise.editing.errors import RequestError
from excise.editing.numerics.live_bytes import LiveBytes
from excise.editing.training.adapters import AdapterShape
from excise.editing.training.entropy import entropy_of_hidden
from excise.editing.training.packing import packing
from excise.recipes.common.examples import Example
from excise.recipes.common.memory_sizes import Gradients, ModelSizes, Rows
from excise.recipes.unlearning.recipe import UnlearningData, pair_batch
from excise.recipes.unlearning.tar import TarLoss, TarSettings, drawn_attack, prepare
from unlearning_rows import FORGET, RETAIN, adapted

OTHERS = [Example((9, 7, 5, 21), 2), Example((33, 8, 2, 6, 14), 3), Example((70, 71, 72), 1)]
DATA = UnlearningData([*FORGET, *OTHERS], RETAIN, [], {})
SETTINGS = TarSettings(
    batch_size=3, attack_steps=4, attack_every=2, attack_batch=2, learning_rate=0.05, retain_weight=0.5
)


def _model():
    return adapted().double()


def _log_p(model, example):
    """Log-probabilities of all tokens at each scored place."""
    logits = model(input_ids=torch.tensor([example.ids])).logits[0]
    return torch.stack([logits[place - 1].log_softmax(-1) for place in range(example.start, len(example.ids))])


def _nll(model, examples):
    told = [-_log_p(model, one)[place, token] for one in examples for place, token in enumerate(one.ids[one.start :])]
    return torch.stack(told).mean()


def _entropy(model, examples):
    rows = torch.cat([_log_p(model, one) for one in examples])
    return -(rows.exp() * rows).sum(-1).mean()


def _gradients(value, trained):
    return [part.detach().clone() for part in torch.autograd.grad(value, trained)]


def _attacked(model, settings):
    """The sum of weighted gradients along the way of the attack, by AdamW's formula."""
    rival = copy.deepcopy(model)
    trained = [p for p in rival.parameters() if p.requires_grad]
    attack = drawn_attack(settings, FORGET, DATA)
    first, second = ([torch.zeros_like(p) for p in trained] for _ in range(2))
    total, value = [torch.zeros_like(p) for p in trained], 0.0
    for step, rows in enumerate(attack.batches, 1):
        for p, g, m, v in zip(trained, _gradients(_nll(rival, rows), trained), first, second, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            move = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            p.data = p.data * (1 - attack.learning_rate * 0.01) - attack.learning_rate * move
        if step % settings.attack_every == 0:
            weight = 4.0 * math.exp(0.0625 * (step - settings.attack_steps))
            entropy = _entropy(rival, FORGET)
            value -= weight * entropy.item()
            total = [one - weight * part for one, part in zip(total, _gradients(entropy, trained), strict=True)]
    return value, torch.cat([one.flatten() for one in total])


@pytest.mark.parametrize("in_one_row", [False, True])
def test_the_gradient_of_the_entropy_is_taken_where_the_attacker_is(in_one_row):
    model = _model()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    trained[0].grad = torch.ones_like(trained[0])
    with packing(model) as can:
        assert can
        terms = TarLoss(SETTINGS, ARCHITECTURES["llama"], 2, DATA)(
            model, pair_batch(FORGET, RETAIN, in_one_row=in_one_row)
        )
    assert all(torch.equal(one, p) for one, p in zip(before, trained, strict=True)), "the attack is undone"
    assert bool((trained[0].grad == 1).all()) and all(p.grad is None for p in trained[1:])
    found = torch.cat([part.flatten() for part in _gradients(terms["forget"], trained)])
    value, wanted = _attacked(model, SETTINGS)
    assert terms["forget"].item() == pytest.approx(value, rel=1e-6)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    weights = 4.0 * (1 + math.exp(-0.125))
    here = torch.cat([part.flatten() for part in _gradients(-weights * _entropy(model, FORGET), trained)])
    assert (here - wanted).norm() > 0.1 * wanted.norm(), "where the model is, it is another"


@pytest.mark.parametrize("in_one_row", [False, True])
def test_what_is_retained_keeps_its_likelihood_and_its_stream(in_one_row):
    model = _model()
    with packing(model) as can:
        assert can
        terms = TarLoss(SETTINGS, ARCHITECTURES["llama"], 2, DATA)(
            model, pair_batch(FORGET, RETAIN, in_one_row=in_one_row)
        )

    def streams(ids):
        read = []
        layers = model.base_model.model.model.layers
        handles = [layer.register_forward_hook(lambda *passed: read.append(passed[-1])) for layer in layers]
        model(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        return torch.stack([one.reshape(len(ids), -1) for one in read])

    far = []
    for example in RETAIN:
        with model.disable_adapter():
            base = streams(example.ids)
        far.append((streams(example.ids) - base).norm(dim=-1))
    wanted = 0.5 * (_nll(model, RETAIN) + torch.cat(far, 1).mean())
    assert terms["retain"].item() == pytest.approx(wanted.item(), rel=1e-6) and torch.cat(far, 1).mean() > 1e-3


def test_an_attack_reads_nothing_that_is_held_out_and_is_drawn_again_alike():
    attacks = [drawn_attack(SETTINGS.model_copy(update={"seed": seed}), FORGET, DATA) for seed in range(40)]
    read = {one for attack in attacks for rows in attack.batches for one in rows}
    assert not read & set(FORGET) and read == {*OTHERS, *RETAIN}
    assert {round(attack.learning_rate, 6) for attack in attacks} == {0.005, 0.05, 0.1}
    assert attacks[0] == drawn_attack(SETTINGS, FORGET[::-1], DATA) != attacks[1]
    repaired = [attack for attack in attacks if set(attack.batches[0]) <= set(RETAIN)]
    assert 5 <= len(repaired) <= 25, "about a third read first what is retained"
    for attack in repaired:
        kinds = [set(rows) <= set(RETAIN) for rows in attack.batches]
        assert kinds == sorted(kinds, reverse=True), "and then the concept"


def test_entropy_in_chunks_is_the_definition():
    hidden, matrix = torch.randn(9, 4, dtype=torch.float64, requires_grad=True), torch.randn(4, 30, dtype=torch.float64)
    found = entropy_of_hidden(hidden, lambda states: states @ matrix, budget=2 * 12 * 30)
    rows = [(row @ matrix).softmax(-1).tolist() for row in hidden]
    wanted = [-sum(p * math.log(p) for p in row) for row in rows]
    assert found.tolist() == pytest.approx(wanted, rel=1e-9) and len(set(wanted)) == 9
    found.sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().max() > 0.01


@pytest.mark.parametrize("rates", [[], [0.1, 0.0]])
def test_rates_are_above_zero(rates):
    with pytest.raises(ValueError, match="must be numbers above 0"):
        TarSettings(attack_rates=rates)
    assert TarSettings(attack_rates=0.5).attack_rates == (0.5,)


def test_an_attack_too_short_for_a_gradient_is_refused():
    with pytest.raises(ValueError, match="attack_every=9 is more than attack_steps=8, so no gradient would be taken"):
        TarSettings(attack_every=9)
    assert TarSettings(attack_every=8).attack_every == 8


def test_a_step_is_not_taken_in_parts():
    with pytest.raises(RequestError, match="tar needs the gradient of a whole step; use gradient_accumulation_steps=1"):
        prepare(TarSettings(gradient_accumulation_steps=2))
    with pytest.raises(RequestError, match="lower batch_size"):
        TarLoss(SETTINGS, ARCHITECTURES["llama"], 2, DATA)(_model(), pair_batch(FORGET[:1], RETAIN[:1]))


def test_what_is_retained_is_read_once_by_the_model_and_once_by_the_base():
    model, reads = _model(), []
    model.base_model.model.model.layers[-1].register_forward_hook(lambda *_: reads.append(torch.is_grad_enabled()))
    TarLoss(SETTINGS, ARCHITECTURES["llama"], 2, DATA)(model, pair_batch(FORGET, RETAIN))
    exams = SETTINGS.attack_steps // SETTINGS.attack_every
    assert reads.count(True) == SETTINGS.attack_steps + exams + 1 and reads.count(False) == 1


def test_a_step_holds_what_is_planned_for_it():
    long = [Example(tuple(5 + place % 90 for place in range(160)), 1)] * SETTINGS.batch_size
    model, data = adapted(), UnlearningData(DATA.forget, long, [], {})
    trained = [p for p in model.parameters() if p.requires_grad]
    with LiveBytes(model.parameters()) as live:
        terms = TarLoss(SETTINGS, ARCHITECTURES["llama"], 2, data)(model, pair_batch(FORGET, long))
        torch.autograd.grad(sum(terms.values()), trained)
    sizes = ModelSizes(model.config.to_dict(), torch.float32)
    layers = sizes.row.layers
    names = tuple(f"{layers}.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj"))
    gradients, step = Gradients(AdapterShape(2, 8.0, names)), Rows(SETTINGS.rows_at_once(), 160)
    beside = SETTINGS.step_bytes(sizes, step)
    assert 0.95 <= (sizes.step(step, gradients) + beside) / live.peak <= 1.15 and beside > 0.03 * live.peak
