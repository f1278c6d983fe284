"""A few cases of every oracle; ``python -m tests.fuzz`` goes on for as long as one likes."""

import pytest
from excise.editing.training import edited_target
from fuzz import oracles


@pytest.mark.parametrize("name", sorted(oracles.ORACLES))
def test_what_computes_agrees_with_its_definition(name):
    for seed in range(12):
        assert oracles.worst_of(name, seed) <= 1, f"worst_of({name!r}, {seed})"


def test_a_difference_is_seen(monkeypatch):
    right = edited_target.mixed

    def wrong(bare, expert, novice, strength, *, one_sided=False):
        return right(bare, expert, novice, strength)

    monkeypatch.setattr(edited_target, "mixed", wrong)
    assert max(oracles.worst_of("edited_targets", seed) for seed in range(12)) > 1
