"""Finding the direction of a concept in one model: candidates at every layer, scored on held-out items, one chosen."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ...artifacts.events import Events
from ...artifacts.models.load import LoadedModel
from ...artifacts.reporting.pages import render
from ...editing.architectures import architecture_of, layer_count
from ...editing.directions.difference_in_means import DIRECTION_SOURCES, Directions, stacked
from ...editing.errors import RequestError
from ...editing.hooks.residual_stream import residual_stream
from ...editing.wiring.row import Architecture
from ...eval.completed import continuation_questions
from ...eval.concept import Concept, ContrastPair, Question
from ...eval.drawing import drawn
from ...eval.inference.candidates import (
    BehaviourProbe,
    Candidate,
    Filters,
    KnowledgeProbe,
    Probe,
    choose,
    score_candidates,
)
from ...eval.inference.chat import encode_prompt
from ...eval.inference.likelihood import pad_left
from ...eval.items import clusters_of
from .budgets import Budgets
from .measured_run import MeasuredSettings
from .tokens import end_positions

PROMPTS_AT_ONCE = 16


class DirectionSettings(MeasuredSettings):
    """How a direction is learned and chosen (Arditi et al. 2024, unless another source is named)."""

    budgets: ClassVar[Budgets] = {
        "quick": {"train_pairs": 64, "validation_pairs": 8, "positions": 2},
        "long": {"train_pairs": 1024},
    }
    direction_source: Literal["difference_in_means"] = "difference_in_means"
    """How directions are learned from the contrast pairs (section 2.3)."""
    train_pairs: int = Field(128, ge=1)
    """Most contrast pairs that directions are learned from (appendix A: 128)."""
    validation_pairs: int = Field(32, ge=1)
    """Contrast pairs, and forget questions of a knowledge pack, that candidate directions are scored on (appendix A:
    32)."""
    positions: int = Field(0, ge=0)
    """Token positions at the end of prompts to try. 0 takes the chat template's closing tokens, or 3 of a plain
    text."""
    point: int | None = Field(None, ge=0)
    """Take the direction at the input of this layer instead of choosing one by its scores."""
    position: int | None = Field(None, le=-1)
    """With point: the token position, counted from the end of the prompt; -1 is the last."""
    max_depth: float = Field(0.8, gt=0, le=1)
    """Reject candidates at or beyond this fraction of the model's depth, 0 to 1 (appendix C: 0.8)."""
    max_kl: float = Field(0.1, ge=0)
    """Reject candidates whose ablation moves neutral text further: KL in nats a token (appendix C: 0.1, on one
    token)."""
    min_induce: float = 0.0
    """Reject candidates that bring out the concept less than this when added to neutral prompts (appendix C: 0)."""


@dataclass(frozen=True)
class Direction:
    """The direction of a concept in the residual stream of one model."""

    vector: Float[Tensor, " d"] = field(repr=False)
    """As long as it was learned: mean activation on positive prompts minus that on negative ones."""
    negative_mean: Float[Tensor, " d"] = field(repr=False)
    """Mean activation on the negative prompts."""
    point: int
    """Where it was learned: the input of this layer."""
    position: int
    """Token it was learned at, counted from the end of the prompt: -1 is the last."""
    passed_filters: bool
    """Whether it satisfies the filters; if not, no candidate did, and it is the one that moves neutral text least."""
    candidates: tuple[Candidate, ...] = field(repr=False)
    """Every direction that was considered, with its scores."""
    provenance: dict[str, Any] = field(repr=False)
    """Where it came from, as the edit records it: model, concept, data, scores of every candidate."""
    learned: Directions | None = field(default=None, repr=False)
    """The directions of all points and positions; None where there are none beside this one."""

    def as_json(self) -> dict[str, Any]:
        """Everything but the tensors."""
        return dict(self.provenance)

    def _repr_html_(self) -> str:
        title = f"A direction for {self.provenance['concept']['ref']}" if self.candidates else "A direction"
        shown = _effect_of(self) if self.candidates else {"sentences": [], "header": [], "rows": []}
        return render("outcome.html.j2", title=title, **shown, samples=[])


@dataclass(frozen=True)
class DirectionSearch:
    """A search for a direction in one loaded model."""

    loaded: LoadedModel
    concept: Concept
    settings: DirectionSettings
    events: Events

    @property
    def row(self) -> Architecture:
        return architecture_of(self.loaded.model.config.to_dict())

    @property
    def layers(self) -> int:
        return layer_count(self.loaded.model.config.to_dict())

    def run(self) -> Direction:
        """Learn candidates on training pairs, score them on validation pairs, choose one.

        Raises:
            ConceptError: The pack has no contrast pairs.
            RequestError: The pack has too few pairs, or ``point`` and ``position`` name no candidate.
            ExciseError: The model treats both sides of the pairs alike.
        """
        settings, concept, loaded = self.settings, self.concept, self.loaded
        validation, training = self._pairs()
        directions = self._learn(training)
        candidates, chosen, passed, probe = self._choose(directions, validation)
        vector, negative_mean = stacked(directions, chosen.point, chosen.position)
        provenance = {
            "source": settings.direction_source,
            "point": chosen.point,
            "position": chosen.position,
            "norm": float(vector.norm()),
            "passed_filters": passed,
            "pairs": {"train": len(training), "validation": len(validation)},
            "probe": probe,
            "candidates": [asdict(candidate) for candidate in candidates],
            "base": loaded.source.describe(),
            "concept": {"ref": concept.ref, "sha256": concept.sha256},
            "seed": settings.seed,
        }
        place = chosen.point, chosen.position
        return Direction(vector, negative_mean, *place, passed, tuple(candidates), provenance, directions)

    def _pairs(self) -> tuple[list[ContrastPair], list[ContrastPair]]:
        """Pairs to validate on, and pairs to learn from."""
        settings, pairs = self.settings, list(self.concept.contrast)
        random.Random(f"excise contrast {settings.seed}").shuffle(pairs)
        # Validation pairs come first, so that they stay the same whatever train_pairs is.
        validation, training = pairs[: settings.validation_pairs], pairs[settings.validation_pairs :]
        return validation, training[: settings.train_pairs]

    def learn(self) -> Directions:
        """One candidate for each point and position, without scores."""
        return self._learn(self._pairs()[1])

    def at(self, directions: Directions, point: int, position: int) -> Direction:
        """The candidate of one place, unscored: whoever names it has chosen it.

        Raises:
            RequestError: There is none.
        """
        if point not in directions.points or position not in directions.positions:
            raise RequestError(_no_candidate(directions, point, position))
        vector, negative_mean = stacked(directions, point, position)
        about = {
            "source": self.settings.direction_source,
            "point": point,
            "position": position,
            "norm": float(vector.norm()),
        }
        about |= {"base": self.loaded.source.describe(), "seed": self.settings.seed}
        about |= {"concept": {"ref": self.concept.ref, "sha256": self.concept.sha256}}
        return Direction(vector, negative_mean, point, position, True, (), about, directions)

    def _learn(self, training: Sequence[ContrastPair]) -> Directions:
        settings, tokenizer = self.settings, self.loaded.tokenizer
        chat = self.concept.about.kind == "behaviour"
        positive, negative = (
            [encode_prompt(tokenizer, text, chat=chat) for text in texts]
            for texts in ([pair.positive for pair in training], [pair.negative for pair in training])
        )
        last = end_positions(settings.positions, [*positive, *negative], chat)
        points, positions = tuple(range(self.layers + 1)), tuple(range(-last, 0))
        with self.events.stage("learn directions", len(positive) + len(negative)) as stage:
            source = DIRECTION_SOURCES[settings.direction_source]
            plus = self._streams(positive, points, last, stage.advance)
            minus = self._streams(negative, points, last, stage.advance)
            return source(plus, minus, points, positions)

    def _choose(
        self, directions: Directions, validation: Sequence[ContrastPair]
    ) -> tuple[list[Candidate], Candidate, bool, dict[str, Any]]:
        """All candidates, the chosen one, whether it passed the filters, and what it was chosen by."""
        settings = self.settings
        with self.events.stage("read the base on validation items"):
            probe = self._probe(validation)
        filters = Filters(settings.max_depth, settings.max_kl, settings.min_induce)
        with self.events.stage("score candidates", len(directions.points) * len(directions.positions)) as stage:
            candidates = score_candidates(
                self.loaded.model, self.row, directions, probe, filters, self.layers, stage.advance
            )
        about = probe.describe() | {"base_bypass": probe.base_bypass, "base_induce": probe.base_induce}
        if settings.point is None:
            return candidates, *choose(candidates, probe.base_bypass), about
        position = -1 if settings.position is None else settings.position
        wanted = [c for c in candidates if (c.point, c.position) == (settings.point, position)]
        if not wanted:
            raise RequestError(_no_candidate(directions, settings.point, position))
        return candidates, wanted[0], wanted[0].rejected is None, about

    def _probe(self, validation: Sequence[ContrastPair]) -> Probe:
        model, tokenizer, concept = self.loaded.model, self.loaded.tokenizer, self.concept
        if concept.about.kind == "behaviour":
            return BehaviourProbe(model, tokenizer, validation, self.settings.max_new_tokens)
        questions = _questions_to_choose_by(concept)
        few = drawn(questions, clusters_of(concept, questions), self.settings.validation_pairs, f"{self.settings.seed}")
        return KnowledgeProbe(model, tokenizer, validation, few)

    def _streams(
        self, rows: Sequence[Sequence[int]], points: tuple[int, ...], last: int, advance: Callable[[int], None]
    ) -> Iterator[Tensor]:
        for start in range(0, len(rows), PROMPTS_AT_ONCE):
            batch = rows[start : start + PROMPTS_AT_ONCE]
            yield residual_stream(self.loaded.model, self.row, pad_left(batch, self.loaded.device), points, last)
            advance(len(batch))


def _no_candidate(directions: Directions, point: int, position: int) -> str:
    return (
        f"there is no candidate at point {point}, position {position}; points 0 to {directions.points[-1]}, positions"
        f" {directions.positions[0]} to -1"
    )


def _effect_of(direction: Direction) -> dict[str, Any]:
    """Sentences on a direction's place and its choice, and a table of what it does to the model."""
    about, probe = direction.provenance, direction.provenance["probe"]
    (chosen,) = (c for c in direction.candidates if (c.point, c.position) == (direction.point, direction.position))
    passing = sum(candidate.rejected is None for candidate in direction.candidates)
    sentences = [
        f"Learned from {about['pairs']['train']} pairs of prompts, at the input of layer {direction.point}, at token "
        f"{direction.position} (-1 is the prompt's last token).",
        f"{passing} of {len(direction.candidates)} candidates passed the filters"
        + ("." if direction.passed_filters else "; this one did not."),
    ]
    if chosen.kl is not None:
        sentences.append(f"Taking it out moves neutral text by {chosen.kl:.4f} nats a token (KL divergence).")
    sentences.append(f"The table shows how strongly the concept shows, in {probe['units']}.")
    rows = [
        ["unchanged", _signed(probe["base_bypass"]), _signed(probe["base_induce"])],
        ["direction taken out", _signed(chosen.bypass), ""],
        ["direction added", "", _signed(chosen.induce)],
    ]
    items = probe.get("validation_questions", probe["validation_pairs"])
    header = ["model", f"with the concept (n = {items})", f"without it (n = {probe['validation_pairs']})"]
    return {"sentences": sentences, "header": header, "rows": rows}


def _signed(value: float | None) -> str:
    return "not scored" if value is None else f"{value:+.2f}"


def why_none_passed(candidates: Sequence[Candidate], settings: DirectionSettings) -> str:
    """One line on which filter rejected how many candidates, by how much, and what would help."""
    scored = [candidate for candidate in candidates if candidate.kl is not None and candidate.induce is not None]
    moving = [c.kl for c in scored if c.kl is not None and c.kl > settings.max_kl]
    still = [c.induce for c in scored if c.induce is not None and c.induce < settings.min_induce]
    reasons = []
    if moving:
        reasons.append(
            f"{len(moving)} move neutral text more than max_kl={settings.max_kl:g} nats a token (the least"
            f" {min(moving):.3f})"
        )
    if still:
        reasons.append(
            f"{len(still)} do not bring out the concept by min_induce={settings.min_induce:g} (the most"
            f" {max(still):+.3f})"
        )
    unscored = Counter(c.rejected for c in candidates if c.kl is None)
    reasons += [f"{count} {reason}" for reason, count in unscored.items()]
    return (
        f"none of {len(candidates)} candidate directions passed the filters: {'; '.join(reasons)}. Nothing was edited;"
        " give more or clearer contrast pairs, loosen the filter that rejects most, or set use_rejected_direction=true"
    )


def check_pairs(concept: Concept, settings: DirectionSettings) -> None:
    """Raise unless the pack has pairs to learn from, pairs to validate on and something to choose by.

    Raises:
        RequestError: It has too few pairs, or nothing of group T to ask.
    """
    if len(concept.contrast) < 2 * settings.validation_pairs:
        raise RequestError(
            f"concept {concept.ref} has {len(concept.contrast)} contrast pairs, validation alone takes "
            f"{settings.validation_pairs}; lower validation_pairs or add pairs"
        )
    if concept.about.kind == "knowledge":
        _ = _questions_to_choose_by(concept)


def _questions_to_choose_by(concept: Concept) -> list[Question]:
    """Forget questions of group T, or which passage continues a text of group T where there is none.

    Raises:
        RequestError: There are no such texts either.
    """
    # Group V is never shown to anything that learns or chooses an edit.
    questions = [q for q in concept.questions if q.split == "forget" and q.group == "T"]
    texts = [row for row in concept.forget if row.group == "T"]
    if chosen := questions or continuation_questions(texts, "forget", "T"):
        return chosen
    raise RequestError(
        f"concept {concept.ref} has no forget questions of group T to choose a direction by; add some to"
        " questions.jsonl, or texts of group T to forget.jsonl"
    )
