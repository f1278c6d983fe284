"""How deep the audited edit erases: streams of the edited model and of the reference, put into the base."""

from collections.abc import Sequence
from typing import Any

from ...artifacts.events import Stage
from ...editing.architectures import architecture_of
from ...eval.depth_score import DepthScore, LayerDepth, Statement, Streams, depth_score, lacking, streams_at_answers
from ...eval.inference.likelihood import context_of, encode_request
from ...eval.inference.questions import requests_of
from .audit_run import AuditRun
from .request import format_questions

FLOOR = "reference"
PUSHED = 2.0
"""How many times what the reference lacks the edited model must lack for that to be said."""


def depth_of(audit: AuditRun) -> dict[str, Any] | None:
    """The score as ``audit.json`` holds it, with a sentence; None without a reference or a question to read."""
    job = audit.job
    if FLOOR not in job.sources or job.behaviour:
        return None
    found: dict[str, list[Streams]] = {}
    for subject in (FLOOR, "edited"):
        loaded = audit.loaded(subject)
        row = architecture_of(loaded.model.config.to_dict())
        asked = _statements(audit, loaded)
        if not asked:
            return None
        with audit.events.stage(f"read the streams of {subject}", len(asked)) as stage:
            found[subject] = streams_at_answers(loaded.model, row, asked, stage.advance)
        del loaded
    loaded = audit.loaded("base")
    with audit.events.stage("put them into the base", len(asked)) as stage:
        unknowing, edited = _lacking(loaded.model, row, asked, found, stage)
    score = depth_score(unknowing, edited, [statement.subject for statement in asked])
    return {**score.describe(), "sentences": sentences(score)}


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


def _lacking(model: Any, row: Any, asked: list[Statement], found: dict[str, list[Streams]], stage: Stage) -> Any:
    return lacking(model, row, asked, [found[FLOOR], found["edited"]], stage.advance)


def _statements(audit: AuditRun, loaded: Any) -> list[Statement]:
    """Questions of group V with their true answers, those that are asked in several formats, as far as they fit."""
    statements = []
    for question in format_questions(audit.job, audit.job.questions):
        scored = encode_request(loaded.tokenizer, requests_of(question)[question.answer])
        if scored.start >= 1 and len(scored.ids) <= context_of(loaded.model):
            statements.append(Statement(tuple(scored.ids), scored.start, str(question.subject or question.id)))
    return statements
