"""Losses of the unlearning methods against their papers' formulas: float64, one sequence and one token at a time."""

import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from excise.editing.architectures import ARCHITECTURES
from excise.editing.training.packing import packing
from excise.recipes import RECIPES
from excise.recipes.common.examples import Example
from excise.recipes.common.step_parts import add_shares
from excise.recipes.unlearning.grad_diff import GradDiffSettings
from excise.recipes.unlearning.jensun import JensunSettings
from excise.recipes.unlearning.npo import NpoSettings
from excise.recipes.unlearning.recipe import UnlearningData, UnlearningTraining, pair_batch
from excise.recipes.unlearning.rmu import RmuSettings
from excise.recipes.unlearning.simnpo import SimNpoSettings
from helpers import PICO, make_pico
from unlearning_rows import FORGET, RETAIN
from unlearning_rows import adapted as _adapted


def _log_likelihood(model, example):
    """Sum of log p(token | all before it) over the scored tokens, and how many they are."""
    double, total = copy.deepcopy(model).double(), 0.0
    for place in range(example.start, len(example.ids)):
        logits = double(input_ids=torch.tensor([example.ids[:place]])).logits[0, -1].tolist()
        largest = max(logits)
        normalizer = largest + math.log(sum(math.exp(logit - largest) for logit in logits))
        total += logits[example.ids[place]] - normalizer
    return total, len(example.ids) - example.start


def _grad_diff(log_p, length, log_p_base):
    return log_p / length


def _npo(log_p, length, log_p_base, beta=0.7):
    return 2 / beta * math.log(1 + (math.exp(log_p) / math.exp(log_p_base)) ** beta)


def _simnpo(log_p, length, log_p_base, beta=1.5, gamma=0.3):
    return -2 / beta * math.log(1 / (1 + math.exp(beta / length * log_p + gamma)))


METHODS = {
    "grad_diff": (GradDiffSettings(retain_weight=0.5), _grad_diff),
    "npo": (NpoSettings(retain_weight=0.5, beta=0.7), _npo),
    "simnpo": (SimNpoSettings(retain_weight=0.5, beta=1.5, gamma=0.3), _simnpo),
}


def _edited_and_base():
    base = make_pico("llama")
    base.set_attn_implementation("sdpa")
    edited = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in edited.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return edited, base


PAIRS = list(zip(FORGET, RETAIN, strict=True))


def _data(known):
    return UnlearningData(FORGET, RETAIN, PAIRS, known)


def _batch(*, in_one_row=False):
    return pair_batch(FORGET, RETAIN, in_one_row=in_one_row)


@pytest.mark.parametrize("in_one_row", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_loss_on_likelihoods_is_its_papers_formula(name, in_one_row):
    settings, formula = METHODS[name]
    edited, base = _edited_and_base()
    known = {example.ids: _log_likelihood(base, example)[0] for example in FORGET}
    loss = settings.loss(None, None, _data(known if settings.compares_with_base else {}))
    with packing(edited) as can:
        assert can
        terms = loss(edited, _batch(in_one_row=in_one_row))

    wanted = sum(formula(*_log_likelihood(edited, example), known[example.ids]) for example in FORGET) / len(FORGET)
    likelihoods = [_log_likelihood(edited, example) for example in RETAIN]
    kept = -0.5 * sum(log_p / length for log_p, length in likelihoods) / len(RETAIN)
    assert terms["forget"].item() == pytest.approx(wanted, rel=1e-4)
    assert terms["retain"].item() == pytest.approx(kept, rel=1e-4)
    over_tokens = -0.5 * sum(log_p for log_p, _ in likelihoods) / sum(length for _, length in likelihoods)
    assert abs(kept - over_tokens) > 1e-3 * abs(kept)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_down_the_loss_makes_what_is_to_be_forgotten_less_likely(name):
    settings, _ = METHODS[name]
    edited, base = _edited_and_base()
    known = {example.ids: _log_likelihood(base, example)[0] for example in FORGET}
    before = [_log_likelihood(edited, example)[0] for example in FORGET]
    settings.loss(None, None, _data(known))(edited, _batch())["forget"].backward()
    with torch.no_grad():
        for parameter in edited.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-3 * parameter.grad)
    assert sum(_log_likelihood(edited, example)[0] for example in FORGET) < sum(before)


def _rmu_loss(settings, pairs=PAIRS):
    run = SimpleNamespace(row=ARCHITECTURES["llama"], layers=2)
    job, loaded = SimpleNamespace(adapter=SimpleNamespace(run=run)), SimpleNamespace(model=make_pico("llama"))
    return settings.loss(job, loaded, UnlearningData(FORGET, RETAIN, pairs, {}))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [*METHODS, "rmu", "jensun"])
def test_parts_of_unequal_length_give_the_gradient_of_the_whole_step(name, packed):
    others = {"rmu": RmuSettings(steer_layer=0.34, retain_weight=7.0), "jensun": JensunSettings()}
    settings = METHODS[name][0] if name in METHODS else others[name]
    model, pairs = _adapted(), [*PAIRS, (Example((7, 8, 9), 1), Example(tuple(range(20, 60)), 2))]
    known = {forget.ids: -3.0 for forget, _ in pairs}
    data = UnlearningData(FORGET, RETAIN, pairs, known)
    if name in METHODS:
        loss = settings.loss(None, None, data)
    else:
        loss = _rmu_loss(settings, pairs) if name == "rmu" else _jensun_loss(settings)
    config = SimpleNamespace(config={"model_type": "llama", **PICO["llama"]})
    adapter = SimpleNamespace(run=SimpleNamespace(layers=2, checkpoint=config), settings=settings)
    job = SimpleNamespace(settings=settings, adapter=adapter)
    training = UnlearningTraining(job, data, loss)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradient(groups, *, weighed=True):
        parts = [training.collate(group) for group in groups]
        if weighed:
            add_shares(parts)
        total = 0.0
        for part in parts:
            shares = part.get("shares", {})
            value = sum(term * shares.get(key, 1.0) for key, term in loss(model, part).items()) / len(parts)
            found = torch.autograd.grad(value, trained, allow_unused=True)
            total = total + torch.cat([g.flatten() for g in found if g is not None])
        return total

    padded, parts = gradient([pairs]), [pairs[:2], pairs[2:]]
    with training.while_training(model) if packed else nullcontext():
        assert ("blocks" in training.collate(pairs)) == packed
        whole = gradient([pairs])
        assert (whole - padded).norm() < 1e-5 * padded.norm()
        assert (gradient(parts) - whole).norm() < 1e-5 * whole.norm()
    if name == "rmu":
        assert (gradient(parts, weighed=False) - whole).norm() > 0.05 * whole.norm()


def test_the_length_of_rmus_target_does_not_depend_on_what_is_read_first():
    settings = RmuSettings(steer_layer=0.34)
    fresh, resumed = _rmu_loss(settings), _rmu_loss(settings)
    fresh(_adapted(), pair_batch(FORGET[:1], RETAIN[:1]))
    resumed(_adapted(), pair_batch(FORGET[2:], RETAIN[2:]))
    assert torch.equal(fresh.target, resumed.target) and fresh.target.norm() > 1


def test_every_method_on_likelihoods_has_a_reference_here():
    of_unlearning = {name for name in RECIPES if ".unlearning." in RECIPES[name].module}
    # The reference of TAR stands in test_tar.
    assert of_unlearning == {*METHODS, "rmu", "jensun", "tar"}


def _jensun_loss(settings=None, refusal=(17, 18)):
    class Tokenizer:
        def __call__(self, text, **_):
            return {"input_ids": list(refusal)}

        def __len__(self):
            return 96

    loaded = SimpleNamespace(tokenizer=Tokenizer())
    return (settings or JensunSettings(retain_weight=0.5)).loss(None, loaded, _data({}))


def _jsd(p, q):
    m = (p + q) / 2
    return sum(float(torch.where(one > 0, one * (one / m).log(), 0.0).sum()) for one in (p, q)) / 2


@pytest.mark.parametrize("in_one_row", [False, True])
def test_jensun_pulls_answers_to_the_refusal_and_holds_the_rest_at_the_base(in_one_row):
    model = _adapted()
    with packing(model) as can:
        assert can
        terms = _jensun_loss()(model, _batch(in_one_row=in_one_row))

    @torch.no_grad()
    def distributions(ids):
        return copy.deepcopy(model).double()(input_ids=torch.tensor([ids])).logits[0].softmax(-1)

    wanted = {"forget": 0.0, "retain": 0.0}
    for example in FORGET:
        p = distributions(example.ids)
        each = []
        for number, place in enumerate(range(example.start, len(example.ids))):
            each.append(_jsd(p[place - 1], torch.eye(96, dtype=torch.float64)[(17, 18)[number % 2]]))
        wanted["forget"] += sum(each) / len(each) / len(FORGET)
    for example in RETAIN:
        with model.disable_adapter():
            q = distributions(example.ids)
        p = distributions(example.ids)
        each = [_jsd(p[place - 1], q[place - 1]) for place in range(example.start, len(example.ids))]
        wanted["retain"] += 0.5 * sum(each) / len(each) / len(RETAIN)
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(wanted, rel=1e-4)
    assert 0 < wanted["retain"] < 0.5 * math.log(2) and wanted["forget"] < math.log(2)


@pytest.mark.parametrize("in_one_row", [False, True])
def test_rmu_steers_the_stream_to_a_random_vector_and_holds_the_rest_where_the_base_has_it(in_one_row):
    settings = RmuSettings(steer_layer=0.22, steering=3.0, retain_weight=7.0, seed=4)
    model = _adapted()
    with packing(model) as can:
        assert can
        terms = _rmu_loss(settings)(model, _batch(in_one_row=in_one_row))

    layer = settings.deepest_layer(2)

    def stream(ids, of_base):
        """What leaves the steered layer at each token, in float64."""
        read: dict[str, torch.Tensor] = {}
        decoder = model.base_model.model.model.layers[layer]
        handle = decoder.register_forward_hook(lambda *passed: read.update(out=passed[-1]))
        try:
            if of_base:
                with model.disable_adapter():
                    model(input_ids=torch.tensor([ids]))
            else:
                model(input_ids=torch.tensor([ids]))
        finally:
            handle.remove()
        return read["out"].detach().double().reshape(len(ids), -1)

    norms = [float(token.norm()) for example in (*FORGET, *RETAIN) for token in stream(example.ids, True)]
    direction = torch.rand(32, generator=torch.Generator().manual_seed(4)).double()
    target = 3.0 * sorted(norms)[(len(norms) - 1) // 2] * direction / direction.norm()
    steered = [(stream(example.ids, False) - target).square() for example in FORGET]
    moved = [(stream(example.ids, False) - stream(example.ids, True)).square() for example in RETAIN]
    assert terms["forget"].item() == pytest.approx(float(torch.cat(steered).mean()), rel=1e-4)
    assert terms["retain"].item() == pytest.approx(7.0 * float(torch.cat(moved).mean()), rel=1e-4)
    assert terms["retain"].item() > 0 and layer == 0
