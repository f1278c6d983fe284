"""Operations and waits for the device are counted, in backward passes too."""

import pytest
import torch
from excise.editing.numerics.operation_counts import OperationCounts

VALUES = torch.arange(4.0)
WAITS = {
    "item": lambda: VALUES.sum().item(),
    "bool": lambda: bool(VALUES.any()),
    "tolist": lambda: VALUES.tolist(),
    "a mask's places": lambda: VALUES[VALUES > 1],
    "nonzero": lambda: VALUES.nonzero(),
    "unique": lambda: torch.unique(VALUES),
    "repeats of unknown length": lambda: VALUES.repeat_interleave(torch.tensor([1, 2, 0, 1])),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_the_host_must_wait_for_is_counted(name):
    with OperationCounts() as counts:
        WAITS[name]()
    assert counts.waits == 1
    WAITS[name]()
    assert counts.waits == 1


def test_what_stays_on_the_device_waits_for_nothing():
    with OperationCounts() as counts:
        VALUES[torch.tensor([1, 2])].sum() + VALUES.repeat_interleave(2)[:4].max()
        torch.where(VALUES > 1, VALUES, 0.0).argmax()
    assert counts.waits == 0 and counts.by_name["aten.where"] == 1


def test_a_backward_pass_counts_too():
    weight = torch.ones(3, 3, requires_grad=True)
    with OperationCounts() as counts:
        loss = (weight @ weight).sum()
        forward = counts.operations
        loss.backward()
    assert forward == 2 and counts.by_name["aten.mm"] == 3
