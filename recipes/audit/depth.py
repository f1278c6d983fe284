"""How deep the audited edit erases: streams of the edited model and of the reference, put into the base."""

from collections.abc import Sequence
from typing import Any

from ...editing.architectures import architecture_of
from ...editing.errors import counted
from ...eval.concept import Question
from ...eval.depth_score import DepthScore, LayerDepth, Statement, Streams, depth_score, lacking, streams_at_answers
from ...eval.inference.likelihood import context_of, encode_request
from ...eval.inference.questions import requests_of
from .audit_run import AuditRun
from .request import format_questions

FLOOR = "reference"
PUSHED = 2.0
"""How many times what the reference lacks the edited model must lack for that to be said."""


def depth_of(audit: AuditRun) -> dict[str, Any] | None:
    """The score as ``audit.json`` holds it, with sentences; None without a reference."""
    job = audit.job
    if FLOOR not in job.sources or job.behaviour:
        return None
    questions = format_questions(job, job.questions)
    found: dict[str, list[Streams]] = {}
    for subject in (FLOOR, "edited"):
        loaded = audit.loaded(subject)
        row = architecture_of(loaded.model.config.to_dict())
        asked = _statements(questions, loaded)
        if not asked:
            said = f"Depth of the edit: not known; none of {len(questions)} questions fits into the model's context."
            return {**DepthScore(None, None, 0, 0, ()).describe(), "sentences": [said]}
        with audit.events.stage(f"read the streams of {subject}", len(asked)) as stage:
            found[subject] = streams_at_answers(loaded.model, row, asked, stage.advance)
        del loaded
    loaded = audit.loaded("base")
    with audit.events.stage("put them into the base", len(asked)) as stage:
        unknowing, edited = lacking(loaded.model, row, asked, [found[FLOOR], found["edited"]], stage.advance)
    score = depth_score(unknowing, edited, [statement.subject for statement in asked])
    return {**score.describe(), "sentences": [*sentences(score), *left_out(len(questions), len(asked))]}


def sentences(score: DepthScore) -> list[str]:
    """What the score says, in words with its figures."""
    if score.value is None:
        return [
            f"Depth of the edit: not known; in none of {score.asked} questions does the reference's stream, put into the"
            " base, take the answer away."
        ]
    low, high = ("…", "…") if score.ci95 is None else (f"{end:.2f}" for end in score.ci95)
    counted = [layer for layer in score.layers if layer.n]
    least, most = (choose(counted, key=lambda layer: layer.erased or 0.0) for choose in (min, max))
    where = f" Gone after layer {least.layer}: {least.erased:.2f}; after layer {most.layer}: {most.erased:.2f}."
    return [
        f"Depth of the edit (Unlearning Depth Score): {score.value:.2f} [{low}, {high}], n = {score.n} of {score.asked}"
        " questions; at 0 every layer still carries what the base knows, at 1 none does, as in a model that never knew."
        f"{where if len(counted) > 1 else ''}{_pushed(counted)}"
    ]


def _pushed(counted: Sequence[LayerDepth]) -> str:
    """Where the edited model's stream makes the answer much less likely than never having known does."""
    furthest = max(counted, key=lambda layer: (layer.edited or 0.0) / (layer.unknowing or 1.0))
    edited, unknowing = furthest.edited or 0.0, furthest.unknowing or 1.0
    if edited < PUSHED * unknowing:
        return ""
    return (
        f" It lacks more than a model that never knew, after layer {furthest.layer} {edited:.1f} nats a token against"
        f" {unknowing:.1f}: the answer is pushed away, which this score counts as gone."
    )


def left_out(questions: int, read: int) -> list[str]:
    """How many questions were not read, where some were not."""
    if questions == read:
        return []
    left = counted(questions - read, "question was", "questions were")
    return [f"Depth of the edit: {left} left out, longer with the answer than the model's context."]


def _statements(questions: Sequence[Question], loaded: Any) -> list[Statement]:
    """Questions with their true answers, as far as they fit into the model's context."""
    statements = []
    for question in questions:
        scored = encode_request(loaded.tokenizer, requests_of(question)[question.answer])
        if scored.start >= 1 and len(scored.ids) <= context_of(loaded.model):
            statements.append(Statement(tuple(scored.ids), scored.start, str(question.subject or question.id)))
    return statements
