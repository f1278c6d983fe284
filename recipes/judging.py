"""Let judges grade the replies of measured models by a rubric: models on this machine, or behind a server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from ..artifacts.events import Events
from ..artifacts.files.opened import OF_A_REQUEST, Unreadable
from ..artifacts.files.parsed import parsed_object, read_yaml
from ..artifacts.judge_server import JudgeServer, ask
from ..artifacts.models.in_memory import opened
from ..artifacts.models.source import ModelSource
from ..editing.errors import RequestError, counted
from ..eval.concept import Concept, Prompt
from ..eval.inference.generation import Reply, generate
from ..eval.measurements.judging import Rubric, grades_in, judged, question_for_judge
from ..eval.statistics import Scores

DEFAULT = "default"
RUBRIC = Path(__file__).parents[1] / "artifacts" / "builtin" / "rubric.yaml"
REPLY_TOKENS = 96
"""Tokens of a judge's JSON object."""


@dataclass(frozen=True)
class Grading:
    """A rubric and who grades by it."""

    rubric: Rubric
    judges: tuple[ModelSource | JudgeServer, ...]


def read_rubric(reference: str) -> Rubric:
    """The rubric in a YAML file, or the built-in one.

    Raises:
        RequestError: The file cannot be read, or is no rubric.
    """
    path = RUBRIC if reference == DEFAULT else Path(reference)
    with OF_A_REQUEST.about(path):
        content = read_yaml(path)
    try:
        return Rubric.model_validate(content)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"])) or "the whole"
        reason = str(detail["msg"]).removeprefix("Value error, ")
        raise RequestError(
            f"{path} is no rubric: {where}: {reason}; it needs instructions, and items with about, lowest and highest"
        ) from error


def grade(
    grading: Grading,
    concept: Concept,
    prompts: Sequence[Prompt],
    replies: Sequence[Sequence[Reply]],
    device: torch.device,
    dtype: torch.dtype,
    events: Events,
) -> tuple[list[list[Scores]], list[str]]:
    """Let every judge grade every model's replies.

    Args:
        grading: Rubric and judges.
        concept: The pack that the prompts are of.
        prompts: What was asked.
        replies: Of each model, one for each prompt.
        device: Where judges on this machine compute.
        dtype: What they compute in.
        events: For progress.

    Returns:
        Scores of each model, and sentences on what it cost and what could not be read.
    """
    found: list[list[Scores]] = [[] for _ in replies]
    notes = []
    for judge in grading.judges:
        asked = [
            question_for_judge(grading.rubric, prompt, reply.text)
            for of_model in replies
            for prompt, reply in zip(prompts, of_model, strict=True)
        ]
        with events.stage(f"let {judge.name} grade the replies", len(asked)) as stage:
            if isinstance(judge, JudgeServer):
                said = ask(judge, asked, stage.advance)
                texts: Sequence[str] = said.texts
                notes.append(
                    f"Judge {judge.name} read {counted(len(asked), 'reply', 'replies')} for {said.prompt_tokens:,} prompt tokens and"
                    f" {said.reply_tokens:,} reply tokens; remembered, at no cost: {said.remembered}."
                )
            else:
                with opened(judge, device, dtype) as loaded:
                    replied = generate(loaded.model, loaded.tokenizer, asked, REPLY_TOKENS, stage.advance)
                    texts = [reply.text for reply in replied]
        grades = [grades_of(grading.rubric, text) for text in texts]
        if unread := sum(not one for one in grades):
            notes.append(f"No grade could be read in {unread} of {len(asked)} answers of judge {judge.name}.")
        for place, of_model in enumerate(replies):
            part = grades[place * len(prompts) : (place + 1) * len(prompts)]
            found[place] += judged(grading.rubric, judge.name, concept, prompts, of_model, part)
    return found, notes


def grades_of(rubric: Rubric, text: str) -> Mapping[str, float]:
    """Grades from what a judge wrote; nothing where there is no JSON object."""
    try:
        return grades_in(rubric, parsed_object(text[text.find("{") : text.rfind("}") + 1]))
    except Unreadable:
        return {}
