"""Options of the unlearning methods against their definitions, over a loss whose gradients are known."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from excise.artifacts.events import Events
from excise.artifacts.models.load import load_model
from excise.editing.errors import RequestError
from excise.editing.training.adapters import AdapterShape
from excise.recipes.common import adapter_run
from excise.recipes.unlearning import robust
from excise.recipes.unlearning.grad_diff import GradDiffSettings
from excise.recipes.unlearning.npo import NpoSettings, prepare, run
from excise.recipes.unlearning.recipe import UnlearningData, UnlearningTraining, _training, pair_batch
from excise.recipes.unlearning.robust import RobustLoss, is_robust, options_in_words
from helpers import SMALL_TESTBED
from unlearning_rows import FORGET, RETAIN
from unlearning_rows import adapted as _adapted

PAIRS = list(zip(FORGET, RETAIN, strict=True))

BATCH = 3


def _settings(**options):
    return NpoSettings(beta=0.5, batch_size=BATCH, **options)


def _data(known):
    return UnlearningData(FORGET, RETAIN, PAIRS, known)


def _loss(settings, work="/nowhere"):
    known = {example.ids: -3.0 for example in FORGET}
    return RobustLoss(settings, settings.loss(None, None, _data(known)), Path(work))


def _batch(first=0):
    order = [(first + place) % 3 for place in range(3)]
    return pair_batch([FORGET[i] for i in order], [RETAIN[i] for i in order])


def _flat(vectors):
    return torch.cat([one.detach().double().flatten() for one in vectors])


def _terms_gradients(settings, model, batch, shift=None):
    """Gradients of both terms in float64, at the model or moved by a vector; and of the mean NLL per token."""
    double = copy.deepcopy(model).double()
    trained = [p for p in double.parameters() if p.requires_grad]
    if shift is not None:
        start = 0
        for p in trained:
            p.data += shift[start : start + p.numel()].view_as(p)
            start += p.numel()
    terms = settings.loss(None, None, _data({example.ids: -3.0 for example in FORGET}))(double, batch)
    nll = GradDiffSettings().loss(None, None, _data({}))(double, batch)["forget"]
    values = {**terms, "nll": -nll}
    return {name: _flat(torch.autograd.grad(value, trained, retain_graph=True)) for name, value in values.items()}


def _found(loss, model, batch):
    """Gradients of both terms as the trainer will find them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = _flat(trained)
    terms = loss(model, batch)
    assert torch.equal(_flat(trained), before), "what is trained is where it was"
    return {name: _flat(torch.autograd.grad(term, trained, retain_graph=True)) for name, term in terms.items()}


def _close(found, wanted):
    assert (found - wanted).norm() < 2e-4 * wanted.norm()


def test_sam_takes_the_gradient_at_the_worst_point_near():
    settings, model = _settings(sam=0.5), _adapted()
    plain = _terms_gradients(settings, model, _batch())
    up = plain["forget"] / plain["forget"].norm()
    wanted = _terms_gradients(settings, model, _batch(), 0.5 * up)
    found = _found(_loss(settings), model, _batch())
    _close(found["forget"], wanted["forget"])
    _close(found["retain"], plain["retain"])
    assert (found["forget"] - plain["forget"]).norm() > 0.02 * plain["forget"].norm()
    values = [loss(model, _batch()) for loss in (_loss(settings), _loss(settings).loss)]
    assert all(values[0][name].item() == values[1][name].item() for name in ("forget", "retain"))


def test_the_mask_keeps_what_agrees_with_the_running_mean_and_lengths_are_the_first():
    settings, model = _settings(mask="sign", normalize=True), _adapted()
    loss, mean, length = _loss(settings), 0.0, None
    for first in range(3):
        plain = _terms_gradients(settings, model, _batch(first))
        mean = 0.9 * mean + 0.1 * plain["retain"]
        kept = torch.where(plain["forget"].sign() == mean.sign(), plain["forget"], 0.0)
        length = length or kept.norm()
        found = _found(loss, model, _batch(first))
        _close(found["forget"], kept * length / kept.norm())
        _close(found["retain"], plain["retain"])
        assert 0.1 < (kept != 0).double().mean() < 0.9
        for p in model.parameters():
            if p.requires_grad:
                p.data *= 1.1


def test_an_adversary_takes_a_step_at_each_step_and_starts_anew():
    settings, model = _settings(adversary=2, adversary_rate=0.2), _adapted()
    loss, away = _loss(settings), None
    for step in range(3):
        away = torch.zeros_like(_terms_gradients(settings, model, _batch())["nll"]) if step % 2 == 0 else away
        away = away - 0.2 * _terms_gradients(settings, model, _batch(step), away)["nll"]
        wanted = _terms_gradients(settings, model, _batch(step), away)
        found = _found(loss, model, _batch(step))
        _close(found["forget"], wanted["forget"])
        plain = _terms_gradients(settings, model, _batch(step))
        assert (wanted["forget"] - plain["forget"]).norm() > 0.01 * plain["forget"].norm()


def test_noise_takes_the_mean_over_points_that_the_seed_and_the_step_decide():
    settings, model = _settings(noise=0.05, noise_samples=2, seed=7), _adapted()
    loss = _loss(settings)
    sizes = [p.shape for p in model.parameters() if p.requires_grad]
    seen = []
    for step in range(2):
        generator = torch.Generator().manual_seed(7 * 1_000_003 + step)
        draws = [_flat([torch.randn(size, generator=generator) for size in sizes]) for _ in range(2)]
        each = [_terms_gradients(settings, model, _batch(), 0.05 * draw)["forget"] for draw in draws]
        seen.append(_found(loss, model, _batch())["forget"])
        _close(seen[-1], sum(each) / 2)
    assert (seen[0] - seen[1]).norm() > 1e-3 * seen[0].norm()


def _pushed_from_the_base(push, model):
    """The terms of a training whose loss is the retain term alone, and gradients of the push."""
    shape = AdapterShape(2, 8.0, tuple(_matrices(model)), {})
    settings = _settings(push=push)
    job = SimpleNamespace(settings=settings, adapter=SimpleNamespace(shape=shape))
    training = object.__new__(UnlearningTraining)
    training.job, training.method_loss = (
        job,
        settings.loss(None, None, _data({example.ids: -3.0 for example in FORGET})),
    )
    return training.loss(model, _batch())


def _matrices(model):
    """The addend of each adapted module, by the module's name."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            up, down = module.lora_B["default"].weight, module.lora_A["default"].weight
            found[name] = module.scaling["default"] * up @ down
    return found


def test_a_push_is_the_root_mean_square_of_what_is_added_to_the_weights():
    model = _adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    terms = _pushed_from_the_base(3.0, model)
    assert set(terms) == {"forget", "retain", "push"} and set(_pushed_from_the_base(0.0, model)) == {"forget", "retain"}
    found = _flat(torch.autograd.grad(terms["push"], trained))
    double = copy.deepcopy(model).double()
    numbers = torch.cat([one.flatten() for one in _matrices(double).values()])
    wanted = -3.0 * numbers.square().mean().sqrt()
    assert terms["push"].item() == pytest.approx(wanted.item(), rel=1e-5) and wanted < -0.01
    _close(found, _flat(torch.autograd.grad(wanted, [p for p in double.parameters() if p.requires_grad])))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    start = _pushed_from_the_base(3.0, model)["push"]
    assert all(bool((part == 0).all()) for part in torch.autograd.grad(start, trained)), "no direction yet, and no NaN"


def test_without_options_the_methods_own_loss_is_trained(tmp_path):
    settings = _settings()
    small = {"model": SMALL_TESTBED, "steps": 2, "batch_size": 1, "device": "cpu", "dtype": "float32"}
    kinds = []
    for options in ({}, {"sam": 0.01}):
        job = prepare(NpoSettings(**small, **options, out=tmp_path / "run"))
        loaded = load_model(job.adapter.run.source, torch.device("cpu"), torch.float32)
        kinds.append(type(_training(job, loaded, Events(), tmp_path).method_loss).__name__)
    assert kinds == ["partial", "RobustLoss"]
    assert not is_robust(settings) and options_in_words(settings) == "" and robust.vectors_held(settings) == 0
    on = _settings(adversary=5, mask="sign", normalize=True)
    assert options_in_words(on) == "adversary=5, normalize=true, mask=sign, adversary_rate=0.01"


@pytest.mark.parametrize("options", [{"sam": 0.1}, {"mask": "sign"}, {"adversary": 3}])
def test_parts_of_a_step_are_refused_in_one_line(options, tmp_path):
    with pytest.raises(RequestError, match="need the gradient of a whole step; use gradient_accumulation_steps=1"):
        prepare(_settings(**options).model_copy(update={"gradient_accumulation_steps": 3}))
    with pytest.raises(RequestError, match="lower batch_size") as caught:
        _loss(_settings(**options))(_adapted(), pair_batch(FORGET[:1], RETAIN[:1]))
    assert "\n" not in str(caught.value)


def test_a_killed_run_goes_on_with_the_state_of_its_options(tmp_path, monkeypatch):
    """Every option at once; the steps between two stored states are taken again."""
    options = {"sam": 0.01, "noise": 0.01, "noise_samples": 1, "mask": "sign", "normalize": True, "adversary": 4}
    small = {"model": SMALL_TESTBED, "steps": 9, "batch_size": 1, "questions": 4, "kl_prompts": 2, "max_new_tokens": 2}

    schedule_of, as_often = adapter_run.schedule_of, robust.STORED_EVERY

    def more_often(job, save_every):
        # The trainer and the options store their states after the same steps.
        assert save_every == as_often
        return schedule_of(job, 5)

    # In the middle of what the adversary does before it starts anew.
    monkeypatch.setattr(robust, "STORED_EVERY", 5)
    monkeypatch.setattr(adapter_run, "schedule_of", more_often)

    def job(name, resume=False):
        settings = NpoSettings(**small, **options, out=tmp_path / name, device="cpu", dtype="float32")
        return prepare(settings, resume=resume)

    whole = run(job("whole"), Events())
    after = UnlearningTraining.after_step

    def killed(self, step):
        after(self, step)
        if step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(UnlearningTraining, "after_step", killed)
        run(job("killed"), Events())
    again = run(job("killed", resume=True), Events())
    sums = [(one.out / "checkpoint" / "model.safetensors").read_bytes() for one in (whole, again)]
    assert sums[0] == sums[1]
    told = again.results["training"]
    assert told["options"]["mask"] == "sign" and "With adversary=4, sam=0.01" in told["about"]
    card = (again.out / "checkpoint" / "README.md").read_text()
    assert "mask=sign" in card
