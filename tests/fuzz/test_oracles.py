"""A few cases of every oracle; ``python -m tests.fuzz`` goes on for as long as one likes."""

from dataclasses import replace

import pytest
from excise.editing.edits.low_rank import Factors
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


@pytest.mark.parametrize("fault", ["half of the update", "rounded twice", "a byte elsewhere"])
def test_an_export_that_is_off_is_seen(monkeypatch, fault):
    right, export = Factors.add_to, oracles.export_edit

    def wrong(self, block, rows, room):
        if fault == "half of the update":
            return right(replace(self, left=self.left / 2), block, rows, room)
        rounded = right(replace(self, left=self.left.bfloat16().float()), block, rows, None).half().float()
        return rounded if room is None else room.copy_(rounded)

    def changed(update, checkpoint, folder):
        export(update, checkpoint, folder)
        path = min(folder.glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    if fault == "a byte elsewhere":
        monkeypatch.setattr(oracles, "export_edit", changed)
    else:
        monkeypatch.setattr(Factors, "add_to", wrong)
    assert max(oracles.worst_of("exported_shards", seed) for seed in range(4)) > 1
