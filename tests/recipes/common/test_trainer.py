"""The one trainer: accumulation, refusals, and going on after a kill."""

import gc
import random
import weakref
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from excise.artifacts.models import load
from excise.editing.errors import EditError, ExciseError, RequestError
from excise.recipes.common.examples import FORWARD, cycled, split_by_length
from excise.recipes.common.step_parts import add_shares
from excise.recipes.common.trainer import LAST_GOOD, Group, Schedule, _StepCallback, fit, precision
from excise.recipes.elm.batches import TERMS, arrange, collate, part_size, sequence_loss
from helpers import make_pico
from torch import nn
from training_rows import Stage
from training_rows import adapted as _adapted
from training_rows import lessons as _lessons
from training_rows import trained_weights as _weights

WEIGHTS = dict.fromkeys(TERMS, 1.0)


def _train(folder, *, steps=3, loss=None, **options):
    adapted = _adapted()
    schedule = Schedule(steps, options.pop("batch_size", 4), 1e-2, 0, **options)
    groups = arrange({"a": _lessons(seed=1), "b": _lessons(seed=2)}, 24, 0)
    stage = Stage()
    fit(adapted, groups, stage, folder, loss or sequence_loss(WEIGHTS), schedule, collate)
    return adapted, stage


@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_are_read_as_they_come_only_where_that_is_asked_for(tmp_path, shuffled):
    adapted, seen = _adapted(), []

    def noted(rows):
        seen.extend(rows)
        return {"rows": rows}

    def loss(model, batch):
        return {"any": sum(p.square().sum() for p in model.parameters() if p.requires_grad)}

    schedule = Schedule(6, 4, 1e-3, 0, shuffled=shuffled, save_every=0)
    fit(adapted, range(24), Stage(), tmp_path, loss, schedule, noted)
    assert sorted(seen) == list(range(24)) and (seen == list(range(24))) is not shuffled


def test_training_moves_the_adapter_and_reports_each_term(tmp_path):
    adapted, stage = _train(tmp_path)
    assert not torch.equal(_weights(adapted), _weights(_adapted()))
    assert set(stage.seen[0]) == set(TERMS)


def test_what_a_training_held_is_gone_when_it_ends(tmp_path):
    """The library's trainer refers to itself: without a search for such circles the moments of what was trained stayed
    beside the next model."""
    parameter, held = nn.Parameter(torch.ones(4)), []

    def loss(model, batch):
        return {"any": parameter.square().sum()}

    def noted(step):
        # It holds the moments, and nothing but the trainer holds it.
        held.extend(weakref.ref(one) for one in gc.get_objects() if isinstance(one, torch.optim.AdamW))

    gc.collect()
    gc.disable()
    try:
        fit(
            make_pico("llama"), range(4), Stage(), tmp_path, loss, Schedule(2, 2, 1e-3, 0, save_every=0),
            lambda rows: {"rows": rows}, [Group([parameter], 1e-3)], noted,
        )  # fmt: skip
    finally:
        gc.enable()
    assert held and all(one() is None for one in held)


@pytest.mark.parametrize("reads", [lambda model, ids: model(ids).logits, lambda model, ids: model.model(ids)[0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_trains_in_its_own_type_whether_a_loss_calls_all_of_it_or_its_decoder(
    reads, dtype, tmp_path, monkeypatch
):
    """Where bfloat16 is fast, the library would put its autocast on the whole model's forward alone."""
    monkeypatch.setattr(load, "bfloat16_is_faster", lambda: True)
    model, ids, seen = make_pico("llama").to(dtype), torch.tensor([[5, 9, 7]]), []

    def loss(model, batch):
        seen.append(reads(model, ids))
        return {"any": seen[-1].float().square().mean()}

    fit(model, range(4), Stage(), tmp_path, loss, Schedule(2, 2, 1e-3, 0, save_every=0), lambda rows: {"rows": rows})
    fresh = make_pico("llama").to(dtype)
    assert torch.equal(seen[0], reads(fresh, ids))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(reads(model, ids), reads(fresh, ids)) and "forward" not in vars(model)
    assert not torch.equal(seen[0], reads(model, ids))


def test_accumulated_parts_give_the_gradient_of_the_whole(tmp_path):
    whole, _ = _train(tmp_path / "whole", batch_size=4)
    parts, _ = _train(tmp_path / "parts", batch_size=2, gradient_accumulation_steps=2)
    less, _ = _train(tmp_path / "less", batch_size=2)
    assert torch.allclose(_weights(whole), _weights(parts), atol=1e-5)
    assert not torch.allclose(_weights(whole), _weights(less), atol=1e-3)


def test_shares_make_the_mean_of_parts_the_mean_of_all_and_an_empty_part_counts_nothing():
    values = {"long": ([1.0, 2.0, 3.0], [7.0]), "gone": ([], [4.0, 6.0]), "never": ([], [])}
    parts = [{"counts": {term: len(of[place]) for term, of in values.items()}} for place in range(2)]
    add_shares(parts)
    for term, of in values.items():
        means = [sum(some) / len(some) if some else 0.0 for some in of]
        every = [value for some in of for value in some]
        step = sum(part["shares"][term] * mean for part, mean in zip(parts, means, strict=True)) / 2
        assert step == pytest.approx(sum(every) / len(every) if every else 0.0)
    assert sum(sum(some) / len(some) for some in values["long"]) / 2 != pytest.approx(3.25)
    (alone,) = alone_part = [{"counts": {"long": 3}}]
    add_shares(alone_part)
    assert "shares" not in alone


def test_groups_can_have_courses_of_their_own_where_a_warm_up_takes_its_first_step(tmp_path):
    moved = {}
    for share in (None, lambda step: min(1.0, (step + 1) / 4)):
        weight = torch.nn.Linear(2, 1)
        before = weight.weight.detach().clone()
        groups = [Group(list(weight.parameters()), 0.1, share)]
        schedule = Schedule(8, 1, 1.0, 0, "constant", warmup_steps=3, save_every=0)
        steps = {}

        def seen(step, weight=weight, steps=steps):
            steps[step] = weight.weight.detach().clone()

        fit(weight, range(8), Stage(), tmp_path, _pull, schedule, lambda rows: {"rows": rows}, groups, seen)
        moved[share is None] = [
            float((later - earlier).abs().max()) for earlier, later in pairwise([before, *steps.values()])
        ]
    assert moved[True][0] == 0 and 0 < moved[False][0] < moved[False][1] < moved[False][2] < moved[False][3]
    # Adam moves by the learning rate; after the warm-up it is whole.
    assert moved[False][3:] == pytest.approx([0.1] * 5, rel=1e-3)


def _pull(model, batch):
    return {"sum": sum(p.sum() for p in model.parameters())}


def test_parts_differentiated_one_after_another_give_the_loss_and_gradient_of_the_whole():
    found = {}
    for most in (10**6, 24, 1):
        adapted = _adapted()
        batch = collate([[lesson] for lesson in _lessons(6)], most)
        terms = sequence_loss(WEIGHTS)(adapted, batch)
        torch.stack(list(terms.values())).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in adapted.parameters() if p.requires_grad])
        found[len(batch["parts"])] = torch.stack([terms[term].detach() for term in TERMS]), gradients
    one, some, each = sorted(found)
    assert one < some < each == 6
    for parts in (some, each):
        torch.testing.assert_close(found[parts][0], found[one][0])
        torch.testing.assert_close(found[parts][1], found[one][1], atol=1e-6, rtol=1e-4)
    assert found[one][1].norm() > 1e-3


def test_of_several_parts_the_activations_of_one_live_at_a_time():
    adapted, outputs, alive = _adapted(), [], []

    def seen(module, inputs, output):
        alive.append(sum(earlier() is not None for earlier in outputs))
        outputs.append(weakref.ref(output))

    # What an activation function gives is kept for its gradient, as long as that may be asked for.
    adapted.get_base_model().model.layers[-1].mlp.act_fn.register_forward_hook(seen)
    batch = collate([[lesson] for lesson in _lessons(6)], 1)
    loss = sequence_loss(WEIGHTS)
    terms = loss(adapted, batch)
    assert len(outputs) == len(batch["parts"]) == 6 and alive == [0] * 6
    del terms
    outputs.clear(), alive.clear()
    kept = [loss(adapted, {"parts": [part]}) for part in batch["parts"]]
    assert alive == list(range(6)) and len(kept) == 6


def test_checkpointed_activations_give_the_same_gradients_and_are_computed_again():
    found = {}
    for checkpointed in (False, True):
        adapted, calls = _adapted(), []
        if checkpointed:
            adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        layer = adapted.get_base_model().model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        adapted.train()
        batch = collate([[lesson] for lesson in _lessons(3)])
        torch.stack(list(sequence_loss(WEIGHTS)(adapted, batch).values())).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in adapted.parameters() if p.requires_grad])
        found[checkpointed] = gradients, len(calls) / len(batch["parts"])
    assert torch.allclose(found[False][0], found[True][0], atol=1e-6) and found[True][0].norm() > 1e-3
    assert (found[False][1], found[True][1]) == (1, 2)


def test_padding_and_company_in_a_batch_change_no_loss():
    model, lessons = make_pico("llama"), _lessons(6)
    loss = sequence_loss(WEIGHTS)
    together = loss(model, collate([[lesson] for lesson in lessons]))
    alone = [loss(model, collate([[lesson]])) for lesson in lessons]
    for term in TERMS:
        assert torch.allclose(together[term], torch.stack([item[term] for item in alone]).mean(), atol=1e-5)


def test_a_run_killed_at_a_step_ends_in_the_same_weights(tmp_path):
    whole, _ = _train(tmp_path / "whole", steps=6, save_every=2)
    calls = 0

    def interrupted(model, batch):
        nonlocal calls
        calls += 1
        if calls > 5:
            raise KeyboardInterrupt
        return sequence_loss(WEIGHTS)(model, batch)

    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "killed", steps=6, save_every=2, loss=interrupted)
    resumed, stage = _train(tmp_path / "killed", steps=6, save_every=2)
    assert torch.equal(_weights(whole), _weights(resumed))
    assert stage.step == 6


@pytest.mark.parametrize("missing", ["trainer_state.json", "optimizer.pt"])
def test_a_checkpoint_that_a_kill_left_half_written_is_not_gone_on_with(tmp_path, missing):
    whole, _ = _train(tmp_path / "whole", steps=6, save_every=2)
    _train(tmp_path / "killed", steps=4, save_every=2)
    half = tmp_path / "killed" / "checkpoint-4"
    for name in {"trainer_state.json", missing}:
        (half / name).unlink()
    resumed, stage = _train(tmp_path / "killed", steps=6, save_every=2)
    assert torch.equal(_weights(whole), _weights(resumed)) and stage.step == 6


@pytest.mark.parametrize("file", ["trainer_state.json", "optimizer.pt", "adapter_model.safetensors", "seal.json"])
def test_a_state_that_was_changed_since_is_refused_and_no_step_is_skipped(tmp_path, file):
    _train(tmp_path, steps=4, save_every=2)
    path = tmp_path / "checkpoint-4" / file
    data = path.read_bytes()
    # More steps than were taken, as far as the file says such things.
    changed = data.replace(b'"global_step": 4', b'"global_step": 6').replace(b"checkpoint-4/", b"checkpoint-6/")
    path.write_bytes(changed if changed != data else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(RequestError, match=r"checkpoint-4 cannot be read .*start the run again") as caught:
        _train(tmp_path, steps=6, save_every=2)
    assert "\n" not in str(caught.value)


def test_a_state_of_a_longer_training_or_under_another_number_is_not_gone_on_with(tmp_path):
    whole, _ = _train(tmp_path / "whole", steps=6, save_every=2)
    _train(tmp_path / "longer", steps=4, save_every=2)
    with pytest.raises(RequestError, match="is the state of step 4 of 3"):
        _train(tmp_path / "longer", steps=3, save_every=2)
    (tmp_path / "longer" / "checkpoint-4").rename(tmp_path / "longer" / "checkpoint-6")
    resumed, stage = _train(tmp_path / "longer", steps=6, save_every=2)
    assert stage.step == 6 and torch.equal(_weights(resumed), _weights(whole))


def test_a_loss_that_is_not_finite_stops_and_names_its_term(tmp_path):
    calls = 0

    def broken(model, batch):
        nonlocal calls
        calls += 1
        terms = sequence_loss(WEIGHTS)(model, batch)
        return terms if calls < 3 else {**terms, "fluency": terms["fluency"] * float("nan")}

    with pytest.raises(ExciseError, match=r"nan at step 3, in the term fluency"):
        _train(tmp_path, steps=6, loss=broken)
    assert (tmp_path / LAST_GOOD / "adapter_model.safetensors").exists()


def test_an_adapter_that_no_gradient_reaches_is_an_error(tmp_path):
    with pytest.raises(ExciseError, match="no gradient reached"):
        _train(tmp_path, loss=sequence_loss(dict.fromkeys(TERMS, 0.0)))


def test_every_kind_of_lesson_is_in_every_group_and_none_is_forgotten():
    kinds = {"a": _lessons(5, 1), "b": _lessons(3, 2)}
    groups = arrange(kinds, 15, 0)
    assert all(len(group) == 2 for group in groups)
    assert {id(group[0]) for group in groups} == {id(lesson) for lesson in kinds["a"]}
    assert {id(group[1]) for group in groups} == {id(lesson) for lesson in kinds["b"]}


def test_a_step_is_one_forward_unless_it_is_large():
    long = [[one] for one in _lessons(24)]
    most = part_size(torch.device("cpu"))
    assert len(collate(long, most, in_one_row=True)["parts"]) == 1 < most <= part_size(torch.device("cuda"))
    tokens = sum(len(one.ids) for (one,) in long)
    for most in (tokens // 2 + 8, tokens // 3 + 8, 20, 9):
        divided = collate(long, most, in_one_row=True)["parts"]
        # Of each token its place in the row, which it shares where sequences begin alike.
        sizes, fewest = [part["where"].numel() for part in divided], -(-tokens // most)
        assert all(part["input_ids"].numel() <= size for part, size in zip(divided, sizes, strict=True))
        assert sum(sizes) == tokens and max(sizes) <= most
        assert fewest <= len(sizes) and (most < 20 or len(sizes) <= fewest + 2)


def test_rows_are_split_where_that_saves_padding_and_only_there():
    assert split_by_length([12] * 20) == [20]
    assert split_by_length([10] * 20 + [60] * 10) == [20, 10]
    assert split_by_length([10, 11]) == [2]
    lengths = sorted([9, 14, 15, 33, 47, 47, 50, 61, 88] * 4)
    sizes = split_by_length(lengths)
    assert sum(sizes) == len(lengths)

    def cost(parts):
        total, end = 0, 0
        for size in parts:
            end += size
            total += size * lengths[end - 1] + FORWARD
        return total

    assert cost(sizes) < cost([len(lengths)])


def test_training_stays_on_the_device_of_the_model(tmp_path, monkeypatch):
    by_default, _ = _train(tmp_path / "no gpu", save_every=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    beside_gpus, _ = _train(tmp_path / "gpus", save_every=0)
    assert torch.equal(_weights(beside_gpus), _weights(by_default))
    assert {parameter.device.type for parameter in beside_gpus.parameters()} == {"cpu"}


def test_attackers_gradients_are_clipped_without_their_scale():
    """In float16 the loss is scaled; a limit is about the plain gradient."""
    parameters = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    groups = [Group([parameter], 0.1) for parameter in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(sum((parameter * (place + 0.01)).sum() for place, parameter in enumerate(parameters))).backward()
    steps = _StepCallback(None, groups, max_grad_norm=1.0)
    accelerator = SimpleNamespace(scaler=scaler, optimizer_step_was_skipped=False)
    steps.trainer = SimpleNamespace(accelerator=accelerator, optimizer=SimpleNamespace(optimizer=optimizer))
    steps.on_pre_optimizer_step(None, SimpleNamespace(global_step=0), None)
    # The first is 0.02 long and stays; the second is 2.02 long and is cut to 1. With the scale both would be cut.
    lengths = [float(parameter.grad.norm()) for parameter in parameters]
    assert lengths == pytest.approx([0.02, 1.0], abs=1e-4)


@pytest.mark.parametrize(
    ("device", "half", "expected"),
    [("cuda", True, (True, False)), ("cuda", False, (False, False)), ("cpu", True, (False, False))],
)
def test_weights_in_float16_train_with_a_scaled_loss_on_cuda_alone(device, half, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=False: True)
    chosen = precision(torch.device(device), half)
    assert (chosen["fp16"], chosen["bf16"]) == expected


def test_nothing_to_train_on_is_an_error_and_not_an_endless_search_for_rows():
    with pytest.raises(EditError, match="no sequence is left to train on"):
        cycled([], 4, random.Random(0))
    assert sorted(cycled([1, 2], 4, random.Random(0))) == [1, 1, 2, 2]
