"""Choosing an edit's strength by a budget: how far the edited model may move from its base on texts that should stay."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...artifacts.checkpoints.originals import originals_of
from ...artifacts.checkpoints.read import Checkpoint
from ...artifacts.events import Events, Stage
from ...artifacts.models.load import LoadedModel
from ...editing.edits.base import WeightEdit
from ...editing.edits.in_place import EditsInPlace, edits_in_place
from ...editing.edits.strength import check_has_strength, scaled
from ...editing.errors import EditError, RequestError
from ...editing.numerics.strength_search import MOST_TRIES, StrengthFound, strength_within
from ...eval.concept import Concept
from ...eval.drawing import drawn
from ...eval.inference.generation import Reply
from ...eval.inference.kept import Kept, divergences, kept
from ...eval.items import clusters_of, held_out_texts
from ...eval.model_under_test import readable_texts

RECORD = "kl_budget"
"""In the provenance of an edit, and in ``eval.json``: how its strength was chosen."""
FEWEST = 8
"""Texts beside the reported ones below which the strength is chosen on the reported ones."""


@dataclass(frozen=True)
class BudgetTexts:
    """Retain texts that no training sees, and the base's distributions along them."""

    texts: Sequence[Reply]
    distributions: Sequence[Kept]
    reported: bool
    """Whether they are the texts of the reported divergence too, because the pack has too few."""


@dataclass(frozen=True)
class Budget:
    """What is asked for."""

    nats: float
    """Most KL(base || edited), per token."""
    max_strength: float = 1.0
    texts: int = 64
    """Texts to measure it on, at most."""
    of: str = "base"
    """What the model is that the divergence is from."""


def fit(
    edit: WeightEdit,
    budget: Budget,
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    concept: Concept,
    events: Events,
    at_strength: Callable[[float], None] = lambda _: None,
    measured: Concept | None = None,
) -> WeightEdit:
    """The edit at the strength that a budget allows; its provenance records how it was chosen.

    Args:
        loaded: The base, which is the base again afterwards, bit for bit.
        checkpoint: Where its weights are stored.
        at_strength: Called with the strength while the chosen edit is applied to the model.
        measured: The part of the pack that is reported, where that is not all of it.

    Raises:
        RequestError: The edit has no strength.
        EditError: No change of the stored weights stays within the budget.
    """
    check_has_strength(edit)
    with events.stage("read the base on retain texts for kl_budget"):
        texts = budget_texts(loaded, concept, budget.texts, measured)
    config = loaded.model.config.to_dict()
    with edits_in_place(loaded.model, config, originals_of(checkpoint, loaded.model)) as tries:
        with events.stage("choose the strength by kl_budget") as stage:
            found = strength_within(
                budget.nats,
                lambda strength: _divergence(edit, strength, tries, loaded, texts, stage),
                budget.max_strength,
            )
        _check(found, budget)
        chosen = scaled(edit, found.strength)
        tries.apply(chosen)
        at_strength(found.strength)
    record = _record(found, budget, texts, edit.provenance.get(RECORD))
    events.note(in_words(record))
    return replace(chosen, provenance={**edit.provenance, RECORD: record})  # type: ignore[type-var]


def budget_texts(loaded: LoadedModel, concept: Concept, most: int, measured: Concept | None = None) -> BudgetTexts:
    """Texts that no training sees and that are not the ones on which the divergence is reported, where there are enough.

    Args:
        most: Texts on which the divergence is reported, and that are drawn.

    Raises:
        RequestError: There are none.
    """
    readable = readable_texts(loaded.model, loaded.tokenizer, held_out_texts(concept))
    clusters = clusters_of(concept, [row for row, _ in readable])
    # The same draw as of the measurement.
    shown = {row.id for row in held_out_texts(measured or concept)}
    to_report = [one for one in readable if one[0].id in shown]
    of_these = clusters_of(concept, [row for row, _ in to_report])
    reported = {row.id for row, _ in drawn(to_report, of_these, most, "divergence")}
    places = [place for place, (row, _) in enumerate(readable) if row.id not in reported]
    others = drawn([readable[place] for place in places], [clusters[place] for place in places], most, "budget")
    enough = len(others) >= min(FEWEST, len(reported))
    chosen = others if enough else [one for one in readable if one[0].id in reported]
    texts = [text for _, text in chosen]
    if not texts:
        raise RequestError(
            f"kl_budget needs retain texts of two tokens or more, and concept {concept.ref} has none; add some to"
            " retain.jsonl, or leave out kl_budget"
        )
    return BudgetTexts(texts, kept(loaded.model, texts), reported=not enough)


def divergence(model: Any, texts: BudgetTexts) -> float:
    """Mean KL(base || model) per token of the texts, in nats: the estimate that ``kl_from_base`` reports."""
    nats = divergences(model, texts.texts, texts.distributions)
    return sum(float(item.sum()) for item in nats) / sum(map(len, nats))


def _divergence(
    edit: WeightEdit, strength: float, tries: EditsInPlace, loaded: LoadedModel, texts: BudgetTexts, stage: Stage
) -> float:
    try:
        changed = any(change.changed for change in tries.apply(scaled(edit, strength)))
        value = divergence(loaded.model, texts) if changed else 0.0
    except EditError:
        # A weight would be infinite: too strong.
        value = math.inf
    stage.advance(1, strength=strength, kl=value)
    return value


def _check(found: StrengthFound, budget: Budget) -> None:
    if found.outcome == "nothing":
        least = f"the smallest change that was seen moves it by {found.least:.2g}" if found.least else "none was seen"
        raise EditError(
            f"kl_budget={budget.nats:g} is below what rounding to the stored type allows: every smaller strength changes no"
            f" weight, and {least} nats per token; raise kl_budget"
        )


def _record(found: StrengthFound, budget: Budget, texts: BudgetTexts, before: Any) -> dict[str, Any]:
    return {
        "budget": budget.nats,
        "strength": found.strength,
        "max_strength": budget.max_strength,
        "kl": found.divergence,
        "outcome": found.outcome,
        "monotone": found.is_monotone,
        "tries": [asdict(one) for one in found.tries],
        "texts": len(texts.texts),
        "texts_are_reported": texts.reported,
        **({"of": budget.of} if budget.of != "base" else {}),
        **({"before": before} if before else {}),
    }


def in_words(record: dict[str, Any]) -> str:
    """What a person must know of how a strength was chosen, in one or a few sentences."""
    said = (
        f"the edit at {record['strength']:.4g} times the strength that it was learned with: KL({record.get('of', 'base')} || edited)"
        f" {record['kl']:.4g} nats per token on {record['texts']} retain texts (kl_budget {record['budget']:g},"
        f" strengths tried: {len(record['tries'])})"
    )
    if record["outcome"] == "whole":
        said += (
            "; that is below the budget, so the budget changes nothing"
            if record["strength"] == 1
            else f"; that is below the budget, and max_strength={record['max_strength']:g} allows no more"
        )
    if record["outcome"] == "steps":
        most = " within the most tries" if len(record["tries"]) >= MOST_TRIES else ""
        said += f"; no strength comes closer to the budget{most}, because rounding moves the divergence in steps"
    if not record["monotone"]:
        said += (
            "; the divergence does not grow with the strength everywhere, so a larger strength may keep the budget too"
        )
    if record["texts_are_reported"]:
        said += "; the pack has too few texts to choose on others than those of the table"
    return said
