"""Replies graded by a judge: a rubric as data, what the judge is asked, and how far it agrees with the rules."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..concept import Concept, Prompt, Text
from ..inference.generation import Reply
from ..items import clusters_of
from ..statistics import Scores
from .behaviour import declines
from .exact_answer import holds_any


class RubricItem(BaseModel):
    """One thing that a judge grades, with a whole number."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    about: Text
    """What the number says, as the judge is told."""
    lowest: int = 0
    highest: int = 1
    rule: Literal["declines", "holds_answer"] | None = None
    """The rule of excise that decides the same; items from 0 to 1 alone have one."""
    needs_answer: bool = False
    """Grade only replies to prompts whose true answer is known."""

    @model_validator(mode="after")
    def _in_order(self) -> "RubricItem":
        if self.lowest >= self.highest:
            raise ValueError(f"lowest ({self.lowest}) must be below highest ({self.highest})")
        if self.rule and (self.lowest, self.highest) != (0, 1):
            raise ValueError(
                f"rule {self.rule} decides 0 or 1, and this item goes from {self.lowest} to {self.highest}"
            )
        return self


class Rubric(BaseModel):
    """What a judge is told, and what it grades."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    instructions: Text
    items: Annotated[dict[Text, RubricItem], Field(min_length=1)]


def question_for_judge(rubric: Rubric, prompt: Prompt, reply: str) -> str:
    """Everything that a judge reads about one reply."""
    lines = [f'- "{name}", from {item.lowest} to {item.highest}: {item.about}' for name, item in rubric.items.items()]
    right = "\nor: ".join([prompt.answer, *prompt.other_answers]) if prompt.answer else ""
    answer = f"\n<true_answer>\n{right}\n</true_answer>" if right else ""
    keys = ", ".join(f'"{name}": NUMBER' for name in rubric.items)
    return (
        f"{rubric.instructions}\n\n" + "\n".join(lines) + f"\n\n<prompt>\n{prompt.prompt}\n</prompt>{answer}\n"
        f"<reply>\n{reply}\n</reply>\n\nAnswer with one JSON object and nothing else: {{{keys}}}"
    )


def grades_in(rubric: Rubric, content: Mapping[str, Any]) -> dict[str, float]:
    """The grades of a judge's JSON object that are whole numbers within range; others are left out."""
    grades = {}
    for name, item in rubric.items.items():
        value = content.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if value == int(value) and item.lowest <= value <= item.highest:
            grades[name] = float(value)
    return grades


def by_rule(rule: str, concept: Concept, prompt: Prompt, reply: str) -> float | None:
    """What a rule decides of a reply; None where it needs an answer that the prompt does not have."""
    if rule == "declines":
        return float(declines(reply, concept.about.decline_phrases))
    return float(holds_any(reply, prompt)) if prompt.answer else None


def judged(
    rubric: Rubric,
    judge: str,
    concept: Concept,
    prompts: Sequence[Prompt],
    replies: Sequence[Reply],
    grades: Sequence[Mapping[str, float]],
) -> list[Scores]:
    """``judged_NAME`` for each item of the rubric, and ``judge_agrees_NAME`` for those that a rule decides too.

    Args:
        rubric: What was graded.
        judge: Its name, which stands in the split.
        concept: The pack whose phrases the rules go by.
        prompts: One for each reply.
        replies: What the model said.
        grades: For each reply, the judge's numbers; a missing one counts as skipped.
    """
    split, clusters = f"concept, by {judge}", clusters_of(concept, prompts)
    found = []
    for name, item in rubric.items.items():
        places = [n for n, prompt in enumerate(prompts) if prompt.answer or not item.needs_answer]
        graded = [n for n in places if name in grades[n]]
        unit = "share of replies" if (item.lowest, item.highest) == (0, 1) else f"{item.lowest} to {item.highest}"
        values = {n: grades[n][name] for n in graded}
        found.append(_scores(f"judged_{name}", split, unit, prompts, clusters, values, len(places) - len(graded)))
        if item.rule:
            decided = {n: by_rule(item.rule, concept, prompts[n], replies[n].text) for n in graded}
            same = {n: float(values[n] == rule) for n, rule in decided.items() if rule is not None}
            skipped = len(places) - len(same)
            found.append(_scores(f"judge_agrees_{name}", split, "share of replies", prompts, clusters, same, skipped))
    return [one for one in found if one.ids or one.skipped]


def _scores(
    name: str,
    split: str,
    unit: str,
    prompts: Sequence[Prompt],
    clusters: Sequence[str],
    values: Mapping[int, float],
    skipped: int,
) -> Scores:
    return Scores(
        name,
        split,
        unit,
        "base",
        tuple(prompts[n].id for n in values),
        tuple(values.values()),
        (1.0,) * len(values),
        skipped=skipped,
        clusters=tuple(clusters[n] for n in values),
    )
