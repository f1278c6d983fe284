"""What rows share is read once, and that changes nothing but the time."""

import collections

import pytest
import torch
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.hooks.token_counts import count_tokens
from excise.editing.training.packing import packing
from excise.recipes.common import prefix_cache as prefixes
from excise.recipes.common.prefix_cache import by_beginning, final_hidden_states, group_by_prefix


def _rows(count, shared, length, seed):
    rng = torch.Generator().manual_seed(seed)
    start = torch.randint(10, 500, (shared,), generator=rng).tolist()
    rests = torch.randint(10, 500, (count, length), generator=rng).tolist()
    return [(*start, *rest[: length - place % 4]) for place, rest in enumerate(rests)]


def test_rows_that_begin_alike_are_read_after_what_they_share_to_the_same_states(monkeypatch):
    model = load_model(find_model("builtin:testbed"), torch.device("cpu"), torch.float32).model
    rows = [*_rows(12, 40, 9, 0), *_rows(9, 50, 7, 1), *_rows(5, 0, 12, 2)]
    wanted = {row: 1 + place % 3 for place, row in enumerate(rows)}
    assert sorted(shared for shared, _ in group_by_prefix(rows, list(wanted.values()))) == [0, 40, 50]
    together = dict(final_hidden_states(model, wanted))
    monkeypatch.setattr(prefixes, "WORTH", 10**9)
    assert [shared for shared, _ in group_by_prefix(rows, list(wanted.values()))] == [0]
    apart = dict(final_hidden_states(model, wanted))
    for row, count in wanted.items():
        assert together[row].shape == apart[row].shape == (count, model.config.hidden_size)
        torch.testing.assert_close(together[row], apart[row], rtol=1e-4, atol=1e-4)


def test_groups_hold_every_row_once_and_share_nothing_that_is_wanted():
    rows = [*_rows(12, 60, 9, 0), *_rows(20, 30, 9, 1), (1, 2, 3), (1, 2)]
    counts = [4] * 32 + [3, 1]
    groups = group_by_prefix(rows, counts)
    assert sorted(index for _, members in groups for index in members) == list(range(len(rows)))
    for shared, members in groups:
        assert len({rows[index][:shared] for index in members}) == 1
        assert all(len(rows[index]) - shared >= counts[index] for index in members)
    # Where all of a row is wanted, nothing before it can be shared.
    assert [shared for shared, _ in group_by_prefix(rows, [len(row) for row in rows])] == [0]


def test_inside_packing_all_that_rows_begin_with_is_read_once_to_the_same_states():
    model = load_model(find_model("builtin:testbed"), torch.device("cpu"), torch.float32).model
    seen = collections.Counter()
    count_tokens(model, lambda name, number: seen.update({name: int(number)}))
    rows = [*_rows(5, 3, 6, 0), *_rows(4, 6, 9, 1), (7, 8)]
    wanted = {row: 1 + place % 2 for place, row in enumerate(rows)}
    alone = dict(final_hidden_states(model, wanted))
    padded = seen["tokens"]
    for budget, fewest in ((1024, len({row[:end] for row in rows for end in range(1, len(row) + 1)})), (8, 8)):
        with packing(model), pytest.MonkeyPatch.context() as patch:
            seen.clear()
            patch.setattr(prefixes, "READ", budget)
            together = dict(final_hidden_states(model, wanted))
        assert together.keys() == alone.keys() and fewest <= seen["tokens"] < padded
        for row, states in together.items():
            assert len(states) == wanted[row]
            torch.testing.assert_close(states, alone[row], rtol=1e-4, atol=1e-4)
        if budget == 1024:
            assert seen["tokens"] == fewest


def test_parts_hold_every_row_once_and_stay_within_their_budget():
    rows = [*_rows(9, 4, 7, 2), *_rows(3, 2, 11, 3), (5,)]
    for budget in (12, 20, 1000):
        parts = [*by_beginning(rows, budget)]
        assert sorted(row for part in parts for row in part) == sorted(rows)
        for part in parts:
            distinct = len({row[:end] for row in part for end in range(1, len(row) + 1)})
            assert len(part) == 1 or (distinct <= budget and sum(map(len, part)) <= 2 * budget)
    # With nothing shared, sixteen tokens of distinct rows are more than fifteen.
    assert len([*by_beginning([(1,) * 8, (2,) * 8], 15)]) == 2
