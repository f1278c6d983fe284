import copy

import numpy as np
import pytest
import torch
from excise.editing.architectures import architecture_of
from excise.editing.directions.difference_in_means import difference_in_means, without_component
from excise.editing.hooks.residual_stream import ablated, added, decoder_layers, read_early, residual_stream
from excise.editing.numerics.moments import Moments
from helpers import make_pico


def _inputs(batch=3, length=7, seed=1):
    ids = torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_the_stream_is_what_the_model_reports_as_hidden_states(architecture):
    model = make_pico(architecture)
    row, inputs = architecture_of(model.config.to_dict()), _inputs()
    count = len(decoder_layers(model, row))
    read = residual_stream(model, row, inputs, tuple(range(count)), 3)
    states = model(**inputs, output_hidden_states=True).hidden_states
    for point in range(count):
        assert torch.allclose(read[point], states[point][:, -3:], atol=1e-5)


def test_the_forward_stops_at_the_deepest_point():
    model = make_pico("llama")
    row, ran = architecture_of(model.config.to_dict()), []
    for index, layer in enumerate(decoder_layers(model, row)):
        layer.register_forward_hook(lambda *_, i=index: ran.append(i))
    residual_stream(model, row, _inputs(), (0, 1), 1)
    assert ran == [0]
    residual_stream(model, row, _inputs(), (2,), 1)
    assert ran == [0, 0, 1]


def test_left_padding_changes_nothing(architecture):
    model = make_pico(architecture)
    row, inputs = architecture_of(model.config.to_dict()), _inputs(1, 6)
    padding = torch.zeros(1, 4, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([padding + 3, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([padding, inputs["attention_mask"]], 1),
    }
    alone, beside = (residual_stream(model, row, batch, (1, 2), 3) for batch in (inputs, padded))
    assert torch.allclose(alone, beside, atol=1e-4)


def test_read_early_a_model_speaks_as_one_that_ends_there(architecture):
    model = make_pico(architecture)
    row, inputs = architecture_of(model.config.to_dict()), _inputs()
    count = len(decoder_layers(model, row))
    short = copy.deepcopy(model)
    del decoder_layers(short, row)[1:]
    short.config.num_hidden_layers = 1
    whole = model(**inputs).logits
    with read_early(model, row, 1):
        early = model(**inputs).logits
    torch.testing.assert_close(early, short(**inputs, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(early, whole, atol=1e-3)
    with read_early(model, row, count):
        assert torch.equal(model(**inputs).logits, whole)
    assert torch.equal(model(**inputs).logits, whole)


def test_hooks_are_gone_after_an_error():
    model = make_pico("llama")
    row = architecture_of(model.config.to_dict())
    before = model(**_inputs()).logits
    with pytest.raises(ZeroDivisionError), ablated(model, row, torch.eye(32)[:, :1]):
        assert not torch.allclose(model(**_inputs()).logits, before)
        raise ZeroDivisionError
    assert torch.equal(model(**_inputs()).logits, before)


def test_addition_moves_prompts_and_leaves_decoded_tokens():
    model = make_pico("llama")
    row, inputs = architecture_of(model.config.to_dict()), _inputs()
    one = {key: value[:, :1] for key, value in inputs.items()}
    before, before_one = model(**inputs).logits, model(**one).logits
    with added(model, row, torch.ones(32), 1):
        assert (model(**inputs).logits - before).abs().max() > 1e-2
        assert torch.equal(model(**one).logits, before_one)


def test_streamed_moments_equal_those_of_all_samples():
    samples = torch.randn(100, 2, 5, generator=torch.Generator().manual_seed(0)) * 3 + 10
    moments = Moments(5, covariance=True)
    for part in samples.split([1, 40, 59]):
        moments.update(part)
    assert torch.allclose(moments.mean, samples.double().mean(0), atol=1e-12)
    for place in range(2):
        assert np.allclose(moments.cov()[place], np.cov(samples[:, place].double().numpy().T), atol=1e-10)


def test_difference_in_means_finds_a_planted_direction():
    generator = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    noise = [0.1 * torch.randn(1, 40, 2, 32, generator=generator) for _ in range(4)]
    positive = [part + 2 * planted for part in noise[:2]]
    found = difference_in_means(positive, noise[2:], (3,), (-2, -1))
    assert found.count == (80, 80)
    for position in range(2):
        assert torch.nn.functional.cosine_similarity(found.vectors[0, position], planted, dim=0) > 0.99
        kept = without_component(found.vectors[0, position], planted)
        assert abs(float(kept @ planted)) < 1e-5
