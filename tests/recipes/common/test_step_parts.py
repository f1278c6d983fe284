"""Where memory runs out: the same step in smaller parts, the same figures in smaller batches, and one line at the end."""

import logging
from contextlib import contextmanager

import pytest
import torch
from excise.editing.errors import OutOfMemory
from excise.editing.numerics.out_of_memory import memory_ran_out
from excise.eval.inference.batches import read_in_batches, token_batches
from excise.eval.inference.likelihood import Request, log_likelihoods
from excise.recipes.common.trainer import Schedule, fit
from excise.recipes.elm.batches import TERMS, arrange, collate, sequence_loss
from helpers import SMALL_TESTBED
from training_rows import Stage
from training_rows import adapted as _adapted
from training_rows import lessons as _lessons
from training_rows import trained_weights as _weights

WEIGHTS = dict.fromkeys(TERMS, 1.0)
CPU_WORDS = (
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."
)
KINDS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError(CPU_WORDS),
    "python": MemoryError,
}


@contextmanager
def at_most(model, tokens, kind="cuda"):
    """An allocator that has room for a forward of so many tokens; yields the sizes of those that were tried."""
    tried = []

    def allocate(_, __, kwargs):
        ids = kwargs["input_ids"]
        tried.append(ids.numel())
        if ids.numel() > tokens:
            raise KINDS[kind]()

    handle = model.register_forward_pre_hook(allocate, with_kwargs=True)
    try:
        yield tried
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_error_is_known_and_others_are_not(kind):
    assert memory_ran_out(KINDS[kind]())
    assert not memory_ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not memory_ran_out(ValueError("out of memory."))


def _train(folder, tokens=10**9, kind="cuda", most=None, less=lambda: False, **options):
    adapted = _adapted()
    inner = adapted.get_base_model().model
    schedule = Schedule(3, 4, 1e-2, 0, save_every=0, **options)
    groups = arrange({"a": _lessons(seed=1), "b": _lessons(seed=2)}, 24, 0)
    with at_most(inner, tokens, kind) as tried:
        room = fit(
            adapted,
            groups,
            Stage(),
            folder,
            sequence_loss(WEIGHTS),
            schedule,
            lambda rows: collate(rows, most() if most else None),
            less=less,
        )
    return adapted, room, tried


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_does_not_fit_is_taken_in_parts_and_ends_in_the_same_weights(tmp_path, caplog, kind):
    whole, room, tried = _train(tmp_path / "whole")
    assert max(tried) > 20 and room.parts == 1 and room.describe() == {}
    with caplog.at_level(logging.WARNING):
        parts, room, tried = _train(tmp_path / "parts", 20, kind)
    assert max(tried) > 20 >= tried[-1]
    assert room.parts > 1 and room.describe()["memory"]["parts_of_a_step"] == room.parts
    torch.testing.assert_close(_weights(whole), _weights(parts), atol=1e-5, rtol=1e-4)
    assert [record.message for record in caplog.records if "memory ran out" in record.message] == [
        "memory ran out in a training step; it goes on in smaller parts, with the same gradient"
    ]


def test_after_the_last_row_the_loss_itself_computes_less(tmp_path):
    most = [10**6]

    def less():
        most[0] //= 10
        return most[0] > 0

    whole, *_ = _train(tmp_path / "whole")
    parts, room, _ = _train(tmp_path / "parts", 9, most=lambda: most[0], less=less)
    assert room.parts == 4 and most[0] < 10
    torch.testing.assert_close(_weights(whole), _weights(parts), atol=1e-5, rtol=1e-4)


def test_one_row_that_does_not_fit_switches_checkpointing_on_and_then_says_what_would_help(tmp_path, caplog):
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(OutOfMemory, match=r"one row at a time .*lower rank") as caught,
    ):
        _train(tmp_path, 3)
    assert "\n" not in str(caught.value)
    assert any("gradient checkpointing is on" in record.message for record in caplog.records)


def test_an_error_that_is_not_about_memory_ends_the_training(tmp_path):
    def broken(model, batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        fit(_adapted(), arrange({"a": _lessons()}, 8, 0), Stage(), tmp_path, broken, Schedule(2, 4, 1e-2, 0), collate)


def test_batches_are_those_of_token_batches_until_memory_runs_out_and_then_halved_for_good():
    lengths, seen = [5, 1, 9, 3, 3, 7, 2], []
    plain = [batch for batch, _ in read_in_batches(lengths, 14, lambda batch: None)]
    assert plain == list(token_batches(lengths, 14))

    def read(batch):
        seen.append(len(batch))
        if len(batch) * max(lengths[place] for place in batch) > 9:
            raise KINDS["cpu"]()
        return [lengths[place] for place in batch]

    found = {p: v for batch, values in read_in_batches(lengths, 40, read) for p, v in zip(batch, values, strict=True)}
    assert found == dict(enumerate(lengths)) and seen[0] == 4 and max(seen[3:]) <= 3

    def never(batch):
        raise KINDS["cuda"]()

    with pytest.raises(OutOfMemory, match=r"one text of 9 tokens .*shorter texts"):
        list(read_in_batches(lengths, 14, never))


def test_figures_do_not_depend_on_whether_memory_ran_out():
    from excise.artifacts.models.find import find_model
    from excise.artifacts.models.load import load_model

    loaded = load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)
    requests = [Request(f"A text about {word}", f" says that {word} is {word}") for word in "abcdefgh"]
    whole = log_likelihoods(loaded.model, loaded.tokenizer, requests)
    with at_most(loaded.model, 40) as tried:
        parts = log_likelihoods(loaded.model, loaded.tokenizer, requests)
    assert tried == [72, 36, 36]
    for request in requests:
        assert whole[request].log_probability == pytest.approx(parts[request].log_probability, abs=1e-4)
        assert whole[request].greedy == parts[request].greedy and whole[request].rank == parts[request].rank


def test_attackers_side_by_side_share_less_where_memory_runs_out(tmp_path):
    from excise.artifacts.concepts import load_concept
    from excise.artifacts.events import Events
    from excise.artifacts.events import Stage as RunStage
    from excise.artifacts.models.find import find_model
    from excise.artifacts.models.load import load_model
    from excise.recipes.audit.attack_data import AttackData
    from excise.recipes.audit.attackers import AttackTraining
    from excise.recipes.audit.attacks.table import ATTACKS, Budget
    from excise.recipes.audit.curve_store import AttackCurves
    from excise.recipes.data.facts import find_facts

    concept = load_concept("builtin:potions")
    questions = tuple(q for q in concept.questions if q.split == "forget" and q.group == "V")[:12]
    budget = Budget((), 2, 3, {"low_rank": (5e-3,)}, batch=2)
    found = {}
    # Each row is about 20 tokens, of three attackers 60.
    for tokens in (10**9, 40):
        loaded = load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)
        data = AttackData(concept, find_facts(concept), questions, loaded.tokenizer, 0)
        training = AttackTraining(loaded.model, data, budget, tmp_path)
        trained = {}

        def after(self, step, seen=trained):
            seen[step] = torch.cat([p.detach().flatten() for owned in self.adapters.owned for p in owned])

        with pytest.MonkeyPatch.context() as patch, at_most(loaded.model.model, tokens) as tried:
            patch.setattr("excise.recipes.audit.side_by_side.SideBySide._test", after)
            patch.setattr("excise.recipes.audit.side_by_side.SideBySide._curve", lambda *_: None)
            patch.setattr("excise.recipes.audit.attackers._joined", lambda *_: AttackCurves({}, 0))
            training.curves({"rtt": ATTACKS["rtt"]}, RunStage(Events(), "attack"))
        found[tokens] = trained[2] - trained[0], tried
    (whole, before), (parts, after_all) = found.values()
    assert max(before) > 40 >= max(after_all[-3:]) and whole.norm() > 1e-2
    # Adam divides by the gradient's size, so that the few gradients of 0 move as their rounding says.
    assert (whole - parts).norm() < 1e-2 * whole.norm()
