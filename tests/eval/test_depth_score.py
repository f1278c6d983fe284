"""The depth of an edit is its definition: one question, one layer and one source at a time, in plain forwards."""

import math

import pytest
import torch
from excise.editing.architectures import architecture_of
from excise.editing.hooks.residual_stream import decoder_layers
from excise.eval.depth_score import LEAST, Statement, depth_score, lacking, streams_at_answers
from helpers import make_pico

STATEMENTS = [
    Statement((5, 9, 11, 7, 3, 8), 4, "Ada"),
    Statement((4, 30, 6), 2, "Ben"),
    Statement((6, 12), 1, "Cid"),
    Statement((4, 31, 6, 2, 9, 13, 10), 3, "Dot"),
]


def _other(model, architecture, changed):
    """The same model with noise in its decoder layers from the first one ``changed`` on."""
    other = make_pico(architecture)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in list(decoder_layers(other, architecture_of(model.config.to_dict())))[changed:]:
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return other


def _naive(base, other, statement, layer):
    """Mean fall in nats of the answer's tokens with one layer's output replaced where they are predicted."""
    row = architecture_of(base.config.to_dict())
    ids = torch.tensor([statement.ids])
    predicting = list(range(statement.start - 1, len(statement.ids) - 1))
    kept = []
    module = decoder_layers(other, row)[layer]
    handle = module.register_forward_hook(lambda _, __, out: kept.append(_first(out).clone()))
    other(ids)
    handle.remove()

    def put(_, __, out):
        hidden = _first(out).clone()
        flat, new = hidden.reshape(-1, hidden.shape[-1]), kept[0].reshape(-1, hidden.shape[-1])
        flat[predicting] = new[predicting]
        hidden = flat.reshape(hidden.shape)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    def mean_log_p():
        log_p = base(ids).logits[0].double().log_softmax(-1)
        return sum(float(log_p[at, statement.ids[at + 1]]) for at in predicting) / len(predicting)

    plain = mean_log_p()
    handle = decoder_layers(base, row)[layer].register_forward_hook(put)
    patched = mean_log_p()
    handle.remove()
    return plain - patched


def _first(output):
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def test_what_a_model_lacks_is_the_fall_in_one_patched_forward_at_a_time(architecture):
    base = make_pico(architecture)
    row, other = architecture_of(base.config.to_dict()), _other(base, architecture, 0)
    sources = [streams_at_answers(model, row, STATEMENTS) for model in (other, base)]
    found = lacking(base, row, STATEMENTS, sources)
    layers = len(decoder_layers(base, row))
    assert found.shape == (2, len(STATEMENTS), layers) and found.dtype == torch.float64
    for number, statement in enumerate(STATEMENTS):
        for layer in range(layers):
            assert float(found[0, number, layer]) == pytest.approx(_naive(base, other, statement, layer), abs=2e-4)
    assert found[0].abs().max() > 0.05, "something to find"
    assert found[1].abs().max() < 2e-4, "a model's own stream takes nothing away"


def test_an_edit_of_the_last_layer_is_shallow_and_one_of_all_layers_is_not():
    base = make_pico("llama")
    row = architecture_of(base.config.to_dict())
    # The unknowing model: all layers are others. Its answers are those that the base gives, so there is a fall.
    with torch.no_grad():
        statements = []
        for name, prompt in enumerate(((5, 9, 11), (4, 30, 6), (6, 12, 3), (8, 2, 7), (3, 3, 14), (9, 1, 2))):
            answer = int(base(torch.tensor([prompt])).logits[0, -1].argmax())
            statements.append(Statement((*prompt, answer), len(prompt), str(name)))
    edits = {"never": _other(base, "llama", 0), "last": _other(base, "llama", len(decoder_layers(base, row)) - 1)}
    sources = [streams_at_answers(model, row, statements) for model in (edits["never"], edits["last"], base)]
    never, last, itself = lacking(base, row, statements, sources)
    subjects = [statement.subject for statement in statements]
    assert depth_score(never, never, subjects).value == pytest.approx(1.0)
    assert depth_score(never, itself, subjects).value == pytest.approx(0.0, abs=1e-3)
    shallow = depth_score(never, last, subjects)
    assert 0 < shallow.value < 0.6
    assert [layer.erased == pytest.approx(0, abs=1e-3) for layer in shallow.layers if layer.n][:-1] == [True] * (
        sum(layer.n > 0 for layer in shallow.layers) - 1
    )


def test_the_score_is_its_formula_question_by_question():
    generator = torch.Generator().manual_seed(0)
    unknowing, edited = (torch.randn(12, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    unknowing[3] = 0.01  # nothing counts for this question
    unknowing[:, 4] = -1.0  # nor this layer
    scores = []
    for delta_1, delta_2 in zip(unknowing.tolist(), edited.tolist(), strict=True):
        counted = [layer for layer in range(5) if delta_1[layer] > LEAST]
        if counted:
            above = sum(delta_1[layer] * min(1, max(0, delta_2[layer] / delta_1[layer])) for layer in counted)
            scores.append(above / sum(delta_1[layer] for layer in counted))
    found = depth_score(unknowing, edited, [str(number) for number in range(12)])
    assert found.value == pytest.approx(sum(scores) / len(scores)) and found.n == len(scores) < found.asked == 12
    assert found.ci95[0] < found.value < found.ci95[1]
    assert found.layers[4].n == 0 and found.layers[4].erased is None
    first = [number for number in range(12) if unknowing[number, 0] > LEAST]
    assert found.layers[0].unknowing == pytest.approx(float(unknowing[first, 0].mean()))
    assert found.layers[0].edited == pytest.approx(float(edited[first, 0].mean()))


def test_without_a_layer_that_counts_there_is_no_score():
    nothing = torch.zeros(3, 2)
    found = depth_score(nothing, nothing, ["a", "b", "c"])
    assert found.value is None and found.ci95 is None and found.n == 0 and found.asked == 3
    assert depth_score(nothing + math.nan, nothing, ["a", "b", "c"]).n == 0


def test_a_source_of_another_depth_is_refused():
    base = make_pico("llama")
    row = architecture_of(base.config.to_dict())
    with pytest.raises(ValueError, match="the model has"):
        lacking(base, row, STATEMENTS[:1], [[torch.zeros(1, 2, base.config.hidden_size)]])
