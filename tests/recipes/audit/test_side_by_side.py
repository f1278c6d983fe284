"""Attackers that train side by side learn what each learns alone, whatever their setups are."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from excise.artifacts.events import Events
from excise.editing.training.packing import packing
from excise.recipes.audit.attack_data import Answers, reading_order
from excise.recipes.audit.attackers import MOST_ATTACKERS, groups_of
from excise.recipes.audit.attacks.fine_tuning import low_rank
from excise.recipes.audit.attacks.table import Setup
from excise.recipes.audit.side_by_side import Attacker, SideBySide, beginnings
from helpers import make_pico
from transformers import get_cosine_schedule_with_warmup
from unlearning_rows import FORGET, RETAIN

SETUPS = (
    Setup(1e-2, 4, 6, "constant", 1),
    Setup(5e-3, 2, 9, "cosine", 2, rank=3),
    Setup(2e-2, 5, 3, "constant", 0, rank=6),
)


class _Data:
    """Sequences of two sources, and a question that everybody answers."""

    questions, others, formats, seed, base, own, tokenizer = (None,), (), None, 0, None, None, None

    def ask(self, model, placeholders=0):
        return Answers([1.0])

    def reading_order(self, source, count, seed):
        return reading_order({"T": FORGET, "retain": RETAIN}, source, count, seed)


def _trained(setups, folder, dtype=torch.float32, less=0, seeds=range(99)):
    """What attackers with these setups, and curves, are after training side by side."""
    model = make_pico("llama").to(dtype)
    model.set_attn_implementation("sdpa")
    attackers = [
        Attacker("rtt", source, float(number), setup, seeds[number], f"0-{seeds[number]}")
        for number, (source, setup) in enumerate(setups)
    ]
    seeds, ranks = [one.seed for one in attackers], [one.setup.rank for one in attackers]
    with packing(model) as packs, low_rank(model, seeds, ranks) as adapters, Events().stage("attack") as stage:
        beside = SideBySide(model, _Data(), folder, attackers, adapters, stage, packs=packs)
        for _ in range(less):
            beside._less()
        curves = beside.curves()
        return curves, [torch.cat([p.detach().flatten() for p in owned]) for owned in adapters.owned]


@pytest.mark.parametrize("less", [0, 1, 2])
def test_attackers_of_different_setups_end_where_each_ends_alone(less, tmp_path):
    pairs = list(zip(("T", "retain", "T"), SETUPS, strict=True))
    curves, together = _trained(pairs, tmp_path / "together", less=less)
    for number, ((curve, broken), found) in enumerate(zip(curves, together, strict=True)):
        assert not broken and curve.steps == SETUPS[number].marks
        # Its own number decides its adapter and its order, so it keeps its place.
        _, alone = _trained(pairs[: number + 1], tmp_path / f"{number}")
        assert (found - alone[number]).norm() < 2e-3 * alone[number].norm()
    # Another batch, another course of the rate or more steps would end elsewhere.
    for other in (Setup(1e-2, 3, 6, "constant", 1), Setup(1e-2, 4, 6, "cosine", 1), Setup(1e-2, 4, 7, "constant", 1)):
        _, elsewhere = _trained([("T", other)], tmp_path / "other")
        assert (together[0] - elsewhere[0]).norm() > 1e-2 * together[0].norm()


def test_tokens_are_counted_at_an_attackers_own_marks(tmp_path):
    curves, _ = _trained([("T", SETUPS[0]), ("T", SETUPS[1])], tmp_path)
    for number, (curve, _) in enumerate(curves):
        setup = SETUPS[number]
        order = reading_order({"T": FORGET}, "T", setup.steps * setup.batch, f"0-{number}")
        read = [sum(len(one.ids) for one in order[: mark * setup.batch]) for mark in setup.marks]
        assert list(curve.tokens) == read and np.shape(curve.hits) == (1, len(setup.marks), 1)


REPAIR = Setup(1e-2, 4, 6, "constant", 1)


def test_whoever_begins_as_another_is_trained_once_until_there_and_ends_where_it_ends_alone(tmp_path, monkeypatch):
    read = []
    losses = SideBySide._mean_nats
    monkeypatch.setattr(
        SideBySide, "_mean_nats", lambda self, model, rows: read.append(list(rows)) or losses(self, model, rows)
    )
    pairs = [("retain", REPAIR), ("retain+T", REPAIR), ("T", REPAIR)]
    (first, second, _), together = _trained(pairs, tmp_path / "together", seeds=[0, 0, 0])
    assert read == [[0, 2]] * 3 + [[0, 1, 2]] * 3
    assert first[0].steps == second[0].steps and first[0].tokens != second[0].tokens
    (_,), (alone,) = _trained([pairs[1]], tmp_path / "alone", seeds=[0])
    assert (together[1] - alone).norm() < 2e-3 * alone.norm()
    # Without the moments, or from the beginning, it would end elsewhere.
    assert (together[0] - together[1]).norm() > 1e-2 * alone.norm()
    monkeypatch.setattr("excise.recipes.common.trainer._go_on_as", lambda *_: None)
    _, late = _trained(pairs, tmp_path / "late", seeds=[0, 0, 0])
    assert (late[1] - alone).norm() > 1e-2 * alone.norm()


def test_other_seeds_and_setups_begin_as_nobody(tmp_path):
    def made(source, setup, seed):
        return Attacker("rtt", source, 0.0, setup, seed, f"0-{seed}")

    def found(*attackers):
        orders = [_Data().reading_order(one.source, one.setup.steps * one.setup.batch, one.order) for one in attackers]
        return beginnings(attackers, orders)

    retain, repair = made("retain", REPAIR, 0), made("retain+T", REPAIR, 0)
    assert found(retain, repair) == found(retain, repair, made("T", REPAIR, 0)) == {1: (0, 3)}
    assert found(retain, made("retain+T", REPAIR, 1)) == {}
    assert found(retain, made("retain+T", replace(REPAIR, rate=2e-2), 0)) == {}
    assert found(retain, made("T", REPAIR, 0)) == {}


def test_what_begins_as_a_diverged_one_has_diverged(tmp_path):
    wild = replace(REPAIR, rate=1e38)
    curves, _ = _trained([("retain", wild), ("retain+T", wild), ("T", REPAIR)], tmp_path, seeds=[0, 0, 0])
    assert [broken for _, broken in curves] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whoever_diverges_takes_nobody_along(dtype, tmp_path):
    steady = Setup(1e-3, 4, 5, "constant", 0)
    wild = Setup(1e38, 4, 5, "constant", 0)
    curves, owned = _trained([("T", steady), ("T", wild), ("retain", steady)], tmp_path, dtype)
    assert [broken for _, broken in curves] == [False, True, False]
    assert owned[0].isfinite().all() and owned[2].isfinite().all()
    assert curves[1][0].hits[0, -1].tolist() == [0.0] and curves[0][0].hits[0, -1].tolist() == [1.0]


@pytest.mark.parametrize("warmup", [0, 5])
def test_a_rate_falls_as_the_librarys_cosine_or_stays_after_a_warm_up_that_begins_above_0(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    library = get_cosine_schedule_with_warmup(optimizer, warmup, 20)
    falling, staying = Setup(1.0, 1, 20, "cosine", warmup), Setup(1.0, 1, 20, "constant", warmup)
    for step in range(20):
        assert falling.share(step) == pytest.approx(library.get_last_lr()[0])
        assert staying.share(step) == pytest.approx(min(1, (step + 1) / (warmup + 1)))
        optimizer.step()
        library.step()
    assert staying.share(0) > 0 and math.isclose(falling.share(20), 0, abs_tol=1e-12)


def test_in_one_row_attackers_of_all_setups_stand_together_and_elsewhere_those_of_one_setup():
    attackers = [Attacker("a", "T", 0.0, setup, n, "") for n, setup in enumerate(SETUPS * 5)]
    together = list(groups_of(attackers, whole=False, in_one_row=True))
    assert [len(group) for group in together] == [MOST_ATTACKERS, 3]
    # Those that end together stand together.
    assert [one.setup.steps for group in together for one in group] == sorted(one.setup.steps for one in attackers)
    apart = list(groups_of(attackers, whole=False, in_one_row=False))
    assert [len(group) for group in apart] == [5, 5, 5] and all(len({o.setup for o in g}) == 1 for g in apart)
    alone = list(groups_of(attackers, whole=True, in_one_row=True))
    assert sorted(one.seed for group in alone for one in group) == list(range(15)) and len(alone) == 15
