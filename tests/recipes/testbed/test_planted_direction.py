import torch
from excise.editing.architectures import architecture_of
from excise.editing.hooks.residual_stream import residual_stream
from excise.recipes.testbed.planted_direction import NOWHERE, RunningDifference, intervened, planted_direction, watched
from helpers import make_pico


def test_interventions_touch_only_the_sequences_they_are_meant_for():
    model = make_pico("llama")
    row = architecture_of(model.config.to_dict())
    direction = planted_direction(0, 32)
    ids = torch.randint(3, 96, (1, 6), generator=torch.Generator().manual_seed(0)).expand(4, 6).contiguous()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ablate_from = torch.tensor([NOWHERE, 0, 1, NOWHERE])
    added = torch.zeros(4, 6)
    added[3, 2] = 5.0
    plain = residual_stream(model, row, inputs, (1, 2), 6)
    with intervened(model, row, direction, ablate_from, added):
        changed = residual_stream(model, row, inputs, (1, 2), 6)
    assert torch.allclose(changed[:, 0], plain[:, 0], atol=1e-5)
    assert (changed[:, 1] @ direction).abs().max() < 1e-4 < (plain[:, 1] @ direction).abs().max()
    assert torch.allclose(changed[0, 2], plain[0, 2], atol=1e-5)  # written before the layer it starts from
    assert not torch.allclose(changed[1, 2], plain[1, 2], atol=1e-3)
    assert torch.allclose(changed[1, 3, :2], plain[1, 3, :2], atol=1e-5)  # earlier positions cannot see it
    assert not torch.allclose(changed[1, 3, 2:], plain[1, 3, 2:], atol=1e-3)


def test_the_running_difference_is_that_of_the_marked_tokens():
    model = make_pico("llama")
    row = architecture_of(model.config.to_dict())
    ids = torch.randint(3, 96, (4, 6), generator=torch.Generator().manual_seed(0))
    ends = torch.zeros(4, 6, dtype=torch.long)
    ends[0, 3] = ends[1, 5] = 1
    ends[2, 2] = -1
    difference = RunningDifference()
    with watched(model, row, difference, ends), torch.no_grad():
        assert not difference.known
        model(ids)
    stream = residual_stream(model, row, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (1,), 6)[0]
    expected = (stream[0, 3] + stream[1, 5]) / 2 - stream[2, 2]
    assert difference.known and torch.allclose(difference.vector(), expected, atol=1e-5)
