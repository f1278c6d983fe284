"""Scoring candidate directions on validation items, and choosing one with the published filters.

Source: Arditi et al. 2024, section 2.3 and appendix C. One change: the divergence is measured along the base model's
whole replies. Over the first token alone, a direction that damages later tokens would pass.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...editing.directions.difference_in_means import Directions, unit
from ...editing.errors import ExciseError, RequestError
from ...editing.hooks.residual_stream import ablated, added
from ...editing.wiring.row import Architecture
from ..concept import ContrastPair, Question
from .chat import encode_prompt
from .generation import Reply, divergence, generate, reply_log_probabilities
from .likelihood import Likelihood, Request, log_likelihoods, padded_logits
from .questions import requests_of


@dataclass(frozen=True)
class Filters:
    """Limits that a candidate must satisfy (Arditi et al. 2024, appendix C)."""

    max_depth: float = 0.8
    """Points at or beyond this fraction of the layers are not considered."""
    max_kl: float = 0.1
    """Largest KL(base || ablated) on neutral replies, in nats per token."""
    min_induce: float = 0.0
    """Least score with which adding the direction must induce the concept, in the probe's units."""


@dataclass(frozen=True)
class Candidate:
    """One direction's scores."""

    point: int
    position: int
    norm: float
    bypass: float | None = None
    """How strongly the concept shows while the direction is ablated; lower is better. Units of the probe."""
    induce: float | None = None
    """How strongly it shows on neutral items while the direction is added; higher is better."""
    kl: float | None = None
    """KL(base || ablated) on neutral items, nats per token."""
    rejected: str | None = None
    """Why the filters reject the candidate; None if it may be chosen."""


class Probe(Protocol):
    """Scores the model in its present state, with or without hooks."""

    units: str
    base_bypass: float
    """Score of the concept on its items in the unchanged model."""
    base_induce: float

    def bypass(self) -> float: ...
    def induce(self) -> float: ...
    def kl(self) -> float: ...
    def describe(self) -> dict[str, Any]: ...


class BehaviourProbe:
    """Log-odds, at the end of the prompt, of the tokens with which the model starts to show a behaviour."""

    units = "log-odds"

    def __init__(self, model: Any, tokenizer: Any, pairs: Sequence[ContrastPair], max_new_tokens: int):
        self.model, self.tokenizer = model, tokenizer
        self.positive = [encode_prompt(tokenizer, pair.positive) for pair in pairs]
        self.negative = [encode_prompt(tokenizer, pair.negative) for pair in pairs]
        positive, negative = (_last(model, rows).exp() for rows in (self.positive, self.negative))
        # A token starts the behaviour if its probability exceeds 5% on some positive prompt, and its mean
        # probability is higher on positive prompts than on negative ones.
        wanted = (positive.mean(0) > negative.mean(0)) & (positive.max(0).values > 0.05)
        self.tokens = wanted.nonzero().flatten()
        self.base_bypass, self.base_induce = self._odds(positive.log()), self._odds(negative.log())
        if self.base_bypass <= self.base_induce + 1:
            raise ExciseError(
                "the model replies alike to positive and negative prompts of contrast.jsonl, so it has no such "
                "behaviour "
                f"(log-odds {self.base_bypass:.2f} against {self.base_induce:.2f}); use a pack whose behaviour this "
                "model shows"
            )
        self.replies = generate(model, tokenizer, [pair.negative for pair in pairs], max_new_tokens)
        self.reference = reply_log_probabilities(model, self.replies)

    def bypass(self) -> float:
        return self._odds(_last(self.model, self.positive))

    def induce(self) -> float:
        return self._odds(_last(self.model, self.negative))

    def kl(self) -> float:
        return _mean_kl(self.model, self.replies, self.reference)

    def describe(self) -> dict[str, Any]:
        shown = [self.tokenizer.decode([token]) for token in self.tokens[:20].tolist()]
        return {"probe": "behaviour", "units": self.units, "beginnings": shown, "validation_pairs": len(self.positive)}

    def _odds(self, log_probabilities: Tensor) -> float:
        # In float64 and with 1e-8 in the logarithm, as the authors compute their score: near 1 a float32 loses 1 - p.
        total = log_probabilities[:, self.tokens].exp().sum(-1).double()
        return float((torch.log(total + 1e-8) - torch.log1p(-total.clamp_max(1 - 1e-8))).mean())


class KnowledgeProbe:
    """Margin of the true choice on forget questions, and the preference for texts on the concept; nats per token."""

    units = "nats"

    def __init__(self, model: Any, tokenizer: Any, pairs: Sequence[ContrastPair], questions: Sequence[Question]):
        self.model, self.tokenizer, self.questions = model, tokenizer, questions
        self.positive = [Request("", pair.positive) for pair in pairs]
        self.negative = [Request("", pair.negative) for pair in pairs]
        # ``induce`` subtracts the preference of the base, so it is 0 while that is measured.
        self.preference = 0.0
        self.base_bypass, self.base_induce = self.bypass(), 0.0
        self.preference = self.induce()
        encoded = [tuple(encode_prompt(tokenizer, pair.negative, chat=False)) for pair in pairs]
        # The first token of a text serves as the prompt, and the rest as the reply.
        self.replies = [Reply("", ids[:1], ids[1:], "") for ids in encoded if len(ids) > 1]
        self.reference = reply_log_probabilities(model, self.replies)

    def bypass(self) -> float:
        by_question = {question.id: requests_of(question) for question in self.questions}
        requests = [request for choices in by_question.values() for request in choices]
        likelihoods = log_likelihoods(self.model, self.tokenizer, requests)
        margins = []
        for question in self.questions:
            values = [likelihoods[request].per_token for request in by_question[question.id]]
            margins.append(values[question.answer] - max(v for i, v in enumerate(values) if i != question.answer))
        return math.fsum(margins) / len(margins)

    def induce(self) -> float:
        likelihoods = log_likelihoods(self.model, self.tokenizer, [*self.positive, *self.negative])
        positive, negative = (
            _mean_per_token([likelihoods[request] for request in side]) for side in (self.positive, self.negative)
        )
        return positive - negative - self.preference

    def kl(self) -> float:
        return _mean_kl(self.model, self.replies, self.reference)

    def describe(self) -> dict[str, Any]:
        return {
            "probe": "knowledge",
            "units": self.units,
            "validation_pairs": len(self.positive),
            "validation_questions": len(self.questions),
        }


@torch.no_grad()
def score_candidates(
    model: Any,
    row: Architecture,
    directions: Directions,
    probe: Probe,
    filters: Filters,
    layers: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Candidate]:
    """Score the direction of every (point, position); those beyond the depth filter are recorded without a score.

    Args:
        model: The model that the directions were learned on.
        row: Its architecture.
        directions: One candidate for each point and position.
        probe: Scores the model while a direction is ablated or added.
        filters: Limits; a candidate outside them gets a reason in ``rejected``.
        layers: Number of decoder layers.
        advance: Called with 1 after each candidate, for progress.
    """
    candidates = []
    for i, point in enumerate(directions.points):
        for j, position in enumerate(directions.positions):
            vector = directions.vectors[i, j]
            norm = float(vector.norm())
            # Rounded down, as in the authors' code.
            if point >= int(filters.max_depth * layers):
                candidates.append(Candidate(point, position, norm, rejected="too deep"))
            elif not math.isfinite(norm) or norm < 1e-6:
                candidates.append(Candidate(point, position, norm, rejected="no difference"))
            else:
                candidates.append(_score(model, row, vector, point, position, probe, filters))
            advance(1)
    return candidates


def choose(candidates: Sequence[Candidate], base_bypass: float) -> tuple[Candidate, bool]:
    """Choose the candidate with the strongest effect among those that pass the filters, and say whether any passed.

    Several candidates often remove the concept completely, and then chance decides which has the lowest bypass. So all
    candidates within a quarter of the best one's effect count as equal, and the one that induces the concept most is
    chosen. If none passes, the candidate with the lowest divergence is returned, and the second value is False.

    Args:
        candidates: Scored candidates.
        base_bypass: The concept's score in the unchanged model, in the probe's units.

    Raises:
        ExciseError: No candidate was scored at all.
    """
    passing = [candidate for candidate in candidates if candidate.rejected is None]
    if passing:
        best = min(_or_infinite(candidate.bypass) for candidate in passing)
        equal = [c for c in passing if _or_infinite(c.bypass) <= best + 0.25 * max(0.0, base_bypass - best)]
        return max(equal, key=lambda c: -math.inf if c.induce is None else c.induce), True
    scored = [candidate for candidate in candidates if candidate.kl is not None and math.isfinite(candidate.kl)]
    if not scored:
        raise ExciseError(
            "no candidate direction could be scored; raise max_depth, or check that contrast.jsonl has two kinds of "
            "prompts"
        )
    return min(scored, key=lambda c: _or_infinite(c.kl)), False


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _score(
    model: Any, row: Architecture, vector: Tensor, point: int, position: int, probe: Probe, filters: Filters
) -> Candidate:
    with ablated(model, row, unit(vector)):
        bypass, kl = probe.bypass(), probe.kl()
    # Added at its whole length, as published: coefficient 1 times the difference in means.
    with added(model, row, vector, point):
        induce = probe.induce()
    # NaN passes both comparisons below, so it is refused before them.
    if not all(map(math.isfinite, (bypass, kl, induce))):
        rejected = "not finite"
    elif kl > filters.max_kl:
        rejected = f"moves neutral text ({kl:.3f} nats)"
    elif induce < filters.min_induce:
        rejected = "does not induce"
    else:
        rejected = None
    return Candidate(point, position, float(vector.norm()), bypass, induce, kl, rejected)


@torch.no_grad()
def _last(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of the next token after each row, fp32 on the CPU."""
    logits = padded_logits(model, rows, min(map(len, rows)) - 1)
    offset = min(map(len, rows))
    places = torch.arange(len(rows)), torch.tensor([len(ids) - offset for ids in rows])
    return logits[places].float().log_softmax(-1).cpu()


def _mean_per_token(likelihoods: Sequence[Likelihood]) -> float:
    # Of a text of one token nothing is scored, because nothing precedes it.
    scored = [likelihood.per_token for likelihood in likelihoods if likelihood.tokens]
    if not scored:
        raise RequestError(
            "every text of one side of contrast.jsonl is a single token, so the model cannot be said to prefer either"
            " side; write longer texts"
        )
    return math.fsum(scored) / len(scored)


def _mean_kl(model: Any, replies: Sequence[Reply], reference: Sequence[Tensor]) -> float:
    changed = reply_log_probabilities(model, replies)
    nats = [divergence(base, other) for base, other in zip(reference, changed, strict=True)]
    return float(torch.cat(nats).mean())
