"""Linear probes: whether a layer still holds the answer, whatever the model says.

A ridge regression learns on group T to map the residual stream at the end of a question to the unembedding of its
answer's
first token, and is tested on group V: the answer is the choice nearest to what it predicts, so answers that T never had
can be found too. Its control learns shuffled answers (Hewitt and Liang 2019): what it scores is chance and its own
capacity.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ...editing.architectures import architecture_of, layer_count, residual_width
from ...editing.hooks.residual_stream import residual_stream
from ...editing.modules import unembedding_rows
from ..concept import Question
from ..inference.batches import read_in_batches
from ..inference.encoding import encode
from ..inference.likelihood import batch_budget, context_of, encode_request, pad_left
from ..inference.questions import questions_by_split, requests_of
from ..model_under_test import ModelUnderTest
from ..statistics import Scores
from . import BY_LAYER
from .by_item import scored

POINTS = 9
"""Points of the stream that are probed, at most, evenly spread from the first layer's input to the last one's
output."""
PENALTIES = (1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties in units of the mean squared length of a sample; chosen by cross-validation on group T."""
FOLDS = 4
ENOUGH = 20
"""Questions of each group below which no probe is fitted."""


@dataclass(frozen=True)
class Asked:
    """Questions with what a probe reads, and what it may answer."""

    states: Float[Tensor, "points questions d"]
    choices: list[Float[Tensor, "choices d"]]
    """Unembedding of each choice's first token."""
    answers: list[int]


def scores(subject: ModelUnderTest) -> list[Scores]:
    """``probe`` at the point that cross-validation on T prefers, its control, and every point's accuracy on V."""
    splits = questions_by_split(subject.concept, subject.settings.questions)
    training, testing = splits.get("forget_T", []), splits.get("forget_V", [])
    if min(len(training), len(testing)) < ENOUGH:
        return []
    points = _points(subject)
    training_set, test_set = _read(subject, training, points), _read(subject, testing, points)
    # random.Random turns a text into the same state in every process, unlike hash().
    rng = random.Random("excise probe control")
    shuffled = [rng.randrange(len(choices)) for choices in training_set.choices]
    best, results = (-1.0, points[0]), {}
    for index, point in enumerate(points):
        expected, hits = fit_probe(training_set, test_set, index, training_set.answers)
        _, control = fit_probe(training_set, test_set, index, shuffled)
        results[point] = (hits, control)
        best = max(best, (expected, point), key=lambda pair: pair[0])
    chosen = results[best[1]]

    def by_layer(point: str, hits: Sequence[bool]) -> Scores:
        return replace(scored(subject, "probe", "forget_V", testing, hits), name=BY_LAYER, split=point)

    return [
        scored(subject, "probe", "forget_V", testing, chosen[0]),
        scored(subject, "probe_control", "forget_V", testing, chosen[1]),
        *(by_layer(f"{point:02d}", hits) for point, (hits, _) in results.items()),
    ]


def _points(subject: ModelUnderTest) -> list[int]:
    layers = layer_count(subject.model.config.to_dict())
    count = min(POINTS, layers + 1)
    return sorted({round(place * layers / (count - 1)) for place in range(count)})


@torch.no_grad()
def question_ends(
    subject: ModelUnderTest, questions: Sequence[Question], points: Sequence[int]
) -> Float[Tensor, "points questions d"]:
    """The stream at the last token of each question, in fp32 on the CPU."""
    # Of a question that is too long for the model, the end is read.
    most = context_of(subject.model)
    rows = [encode(subject.tokenizer, question.prompt)[-most:] for question in questions]
    row = architecture_of(subject.model.config.to_dict())
    states = torch.empty(len(points), len(rows), residual_width(subject.model.config.to_dict()))

    def read(batch: list[int]) -> Tensor:
        # Padded on the left, so that the last position is every question's last token.
        inputs = pad_left([rows[i] for i in batch], subject.model.device)
        return residual_stream(subject.model, row, inputs, points, 1)[:, :, 0].float().cpu()

    for batch, ends in read_in_batches([len(ids) for ids in rows], 4 * batch_budget(subject.model), read):
        states[:, batch] = ends
    return states


@torch.no_grad()
def _read(subject: ModelUnderTest, questions: Sequence[Question], points: Sequence[int]) -> Asked:
    states = question_ends(subject, questions, points)
    choices = []
    for question in questions:
        parts = [encode_request(subject.tokenizer, request) for request in requests_of(question)]
        choices.append(unembedding_rows(subject.model, [part.ids[part.start] for part in parts]))
    return Asked(states, choices, [question.answer for question in questions])


def fit_probe(training_set: Asked, test_set: Asked, index: int, answers: Sequence[int]) -> tuple[float, list[bool]]:
    """Fit a probe at one point: the accuracy that cross-validation on T expects, and which questions of V it answers
    rightly."""
    mean, spread = training_set.states[index].mean(0), training_set.states[index].std(0) + 1e-6
    # Means and spreads are those of T, because V must not shape the probe that it tests.
    x, tested = ((part.states[index] - mean).double() / spread for part in (training_set, test_set))
    centre = torch.cat(training_set.choices).mean(0)
    wanted = [(choices - centre).double() for choices in training_set.choices]
    y = torch.stack([choices[answer] for choices, answer in zip(wanted, answers, strict=True)])
    # At the first point all questions may end in the same token, so that there is nothing to read.
    scale = max(float(x.square().sum(-1).mean()), 1e-6)
    folds = torch.arange(len(x)) % FOLDS
    expected = []
    for penalty in PENALTIES:
        hits: list[bool] = []
        for fold in range(FOLDS):
            inside, outside = folds != fold, (folds == fold).nonzero().flatten().tolist()
            predicted = x[outside] @ _ridge(x[inside], y[inside], penalty * scale)
            chosen = _nearest(predicted, [wanted[i] for i in outside])
            hits += [place == answers[i] for place, i in zip(chosen, outside, strict=True)]
        expected.append(sum(hits) / len(hits))
    best = max(range(len(PENALTIES)), key=lambda i: expected[i])
    predicted = tested @ _ridge(x, y, PENALTIES[best] * scale)
    chosen = _nearest(predicted, [(choices - centre).double() for choices in test_set.choices])
    return expected[best], [place == answer for place, answer in zip(chosen, test_set.answers, strict=True)]


def _ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    n, d = x.shape
    # The smaller of the two equal forms.
    if d <= n:
        return torch.linalg.solve(x.T @ x + penalty * torch.eye(d, dtype=x.dtype), x.T @ y)
    return x.T @ torch.linalg.solve(x @ x.T + penalty * torch.eye(n, dtype=x.dtype), y)


def _nearest(predicted: Tensor, choices: Sequence[Tensor]) -> list[int]:
    """For each question, the choice in whose direction the prediction points most."""
    return [
        int((torch.nn.functional.normalize(options, dim=-1) @ guess).argmax())
        for guess, options in zip(predicted, choices, strict=True)
    ]
