"""Tier 0: the answer is read from the residual stream, or the stream is mended; nothing is trained but a probe."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from torch import Tensor

from ....editing.architectures import architecture_of, layer_count
from ....editing.hooks.residual_stream import added, read_early, skipped
from ....eval.inference.multiple_choice_set import MultipleChoiceSet
from ....eval.measurements.probe import question_ends
from ....eval.measurements.probe import scores as probe_scores
from ....eval.model_under_test import EvalSettings, ModelUnderTest
from ..attack_data import AttackData
from .weights import as_base


def logit_lens(model: Any, data: AttackData) -> Sequence[float]:
    """Read from the stream without the layers above."""
    row = architecture_of(model.config.to_dict())
    return _at_best_layer(model, data, lambda layer: read_early(model, row, layer))


def probe(model: Any, data: AttackData) -> Sequence[float]:
    """A linear probe at the layer that cross-validation on T prefers, tested on V; NaN where a question cannot be
    scored."""
    by_name = {scores.name: scores for scores in probe_scores(_under_test(model, data))}
    result = by_name.get("probe")
    by_id = dict(zip(result.ids, result.totals, strict=True)) if result else {}
    return [by_id.get(question.id, math.nan) for question in data.questions]


def undo_direction(model: Any, data: AttackData) -> Sequence[float]:
    """Add to the stream what an edit took from it, on average over questions of T."""
    assert data.base is not None
    # Layer 0 is left out: what the embeddings lost was nothing yet of an answer.
    row, layers = architecture_of(model.config.to_dict()), range(1, layer_count(model.config.to_dict()))

    def mean_ends() -> Tensor:
        """Mean over questions of the stream at their last token [layers, d]."""
        return question_ends(_under_test(model, data), data.training_questions, layers).mean(1)

    now = mean_ends()
    with as_base(model, data):
        lost = mean_ends() - now
    return _at_best_layer(model, data, lambda layer: added(model, row, lost[layer - 1], layer))


def skip_layer(model: Any, data: AttackData) -> Sequence[float]:
    """Leave out the layer without which group T gains most."""
    row = architecture_of(model.config.to_dict())
    return _at_best_layer(model, data, lambda layer: skipped(model, row, layer), first=0)


def _at_best_layer(
    model: Any, data: AttackData, attacked: Callable[[int], AbstractContextManager[Any]], first: int = 1
) -> Sequence[float]:
    """Under an attack at one layer of the stream, the layer that brings out most of T; asked V."""
    of_t = MultipleChoiceSet(data.tokenizer, data.training_questions)
    layers, best = layer_count(model.config.to_dict()), (-1.0, 0)
    for layer in range(first, layers):
        with attacked(layer):
            best = max(best, (float(np.mean(of_t.hits(model))), layer), key=lambda pair: pair[0])
    with attacked(best[1]):
        return data.multiple_choice.hits(model)


def _under_test(model: Any, data: AttackData) -> ModelUnderTest:
    return ModelUnderTest(model, data.tokenizer, data.concept, EvalSettings())
