"""Linear probes: whether a layer still holds which choice is true, whatever the model says.

A ridge regression on the residual stream at the end of "question choice" learns on group T which choice is true, and is
tested on group V. Its control learns shuffled answers (Hewitt and Liang 2019): what it scores is chance and its own capacity.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..editing.activations import residual_stream
from ..editing.architectures import architecture_of
from .concept import Question
from .likelihood import batch_budget, token_batches
from .multiple_choice import questions_by_split, requests_of
from .statistics import Scores
from .subject import Subject

POINTS = 9
"""Points of the stream that are probed, at most, evenly spread from the first layer's input to the last one's output."""
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties in units of the mean squared length of a sample; chosen by cross-validation on group T."""
FOLDS = 4
ENOUGH = 20
"""Questions of each group below which no probe is fitted."""


@dataclass(frozen=True)
class Asked:
    """Questions as samples: one for each choice, centred on its question's mean."""

    features: Float[Tensor, "points samples d"]
    question: Tensor
    """Of each sample, the number of its question."""
    answers: list[int]
    choices: list[int]


def scores(subject: Subject) -> list[Scores]:
    """``probe`` at the point that cross-validation on T prefers, its control, and every point's accuracy on V."""
    splits = questions_by_split(subject.concept, subject.settings)
    training, testing = splits.get("forget_T", []), splits.get("forget_V", [])
    if min(len(training), len(testing)) < ENOUGH:
        return []
    points = _points(subject)
    learned, asked = _read(subject, training, points), _read(subject, testing, points)
    rng = random.Random("excise probe control")
    shuffled = [rng.randrange(count) for count in learned.choices]
    ids = tuple(question.id for question in testing)
    best, results = (-1.0, points[0]), {}
    for index, point in enumerate(points):
        expected, hits = fit_probe(learned, asked, index, learned.answers)
        _, control = fit_probe(learned, asked, index, shuffled)
        results[point] = (hits, control)
        best = max(best, (expected, point), key=lambda pair: pair[0])
    chosen = results[best[1]]
    return [
        _scores("probe", "forget_V", ids, chosen[0]),
        _scores("probe_control", "forget_V", ids, chosen[1]),
        *(_scores("probe_at_layer", f"{point:02d}", ids, hits) for point, (hits, _) in results.items()),
    ]


def _points(subject: Subject) -> list[int]:
    layers = int(subject.model.config.num_hidden_layers)
    count = min(POINTS, layers + 1)
    return sorted({round(place * layers / (count - 1)) for place in range(count)})


def _read(subject: Subject, questions: Sequence[Question], points: Sequence[int]) -> Asked:
    texts = [request.prompt + request.continuation for question in questions for request in requests_of(question)]
    rows = [subject.tokenizer(text)["input_ids"] for text in texts]
    row = architecture_of(subject.model.config.to_dict())
    width = int(subject.model.config.hidden_size)
    features = torch.empty(len(points), len(rows), width)
    for batch in token_batches([len(ids) for ids in rows], 4 * batch_budget(subject.model)):
        padded = subject.tokenizer.pad(
            {"input_ids": [rows[i] for i in batch]}, padding=True, padding_side="left", return_tensors="pt"
        )  # fmt: skip
        inputs = {key: padded[key].to(subject.model.device) for key in ("input_ids", "attention_mask")}
        features[:, batch] = residual_stream(subject.model, row, inputs, points, 1)[:, :, 0].float().cpu()
    choices = [len(question.choices) for question in questions]
    question = torch.repeat_interleave(torch.arange(len(questions)), torch.tensor(choices))
    sums = torch.zeros(len(points), len(questions), width).index_add(1, question, features)
    features = features - (sums / torch.tensor(choices)[:, None])[:, question]
    return Asked(features, question, [question.answer for question in questions], choices)


def fit_probe(learned: Asked, asked: Asked, index: int, answers: Sequence[int]) -> tuple[float, list[bool]]:
    """Fit a probe at one point: the accuracy that cross-validation on T expects, and which questions of V it answers rightly."""
    x, y = learned.features[index].double(), _indicator(learned, answers)
    scale = x.square().sum(-1).mean()
    folds = learned.question % FOLDS
    expected = []
    for penalty in PENALTIES:
        hits: list[bool] = []
        for fold in range(FOLDS):
            inside, outside = folds != fold, folds == fold
            weights = _ridge(x[inside], y[inside], float(penalty * scale))
            chosen = _choose(x[outside] @ weights, learned.question[outside])
            hits += [chosen[number] == answers[number] for number in chosen]
        expected.append(sum(hits) / len(hits))
    place = max(range(len(PENALTIES)), key=lambda i: expected[i])
    weights = _ridge(x, y, float(PENALTIES[place] * scale))
    chosen = _choose(asked.features[index].double() @ weights, asked.question)
    return expected[place], [chosen[number] == answer for number, answer in enumerate(asked.answers)]


def _ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    n, d = x.shape
    # The smaller of the two equal forms.
    if d <= n:
        return torch.linalg.solve(x.T @ x + penalty * torch.eye(d, dtype=x.dtype), x.T @ y)
    return x.T @ torch.linalg.solve(x @ x.T + penalty * torch.eye(n, dtype=x.dtype), y)


def _indicator(asked: Asked, answers: Sequence[int]) -> Tensor:
    return torch.cat([
        torch.nn.functional.one_hot(torch.tensor(answer), count).double() - 1 / count
        for answer, count in zip(answers, asked.choices, strict=True)
    ])  # fmt: skip


def _choose(scored: Tensor, question: Tensor) -> dict[int, int]:
    """The best choice of each question."""
    numbers, counts = question.unique_consecutive(return_counts=True)
    parts = scored.split(counts.tolist())
    return {int(number): int(part.argmax()) for number, part in zip(numbers, parts, strict=True)}


def _scores(name: str, split: str, ids: tuple[str, ...], hits: Sequence[bool]) -> Scores:
    return Scores(name, split, "accuracy", "lower", ids, tuple(map(float, hits)), (1.0,) * len(ids))
