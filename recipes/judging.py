"""Let judges read the replies of measured models, and grade them by a rubric: models here, or behind a server."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from ..artifacts.events import Events
from ..artifacts.files.opened import OF_A_REQUEST, Unreadable
from ..artifacts.files.parsed import parsed_object, read_yaml
from ..artifacts.judge_server import JudgeServer, ask
from ..artifacts.models.in_memory import opened
from ..artifacts.models.load import LoadedModel
from ..artifacts.models.source import ModelInMemory, ModelSource
from ..editing.errors import RequestError, counted
from ..eval.concept import Concept, Prompt
from ..eval.inference.generation import Reply, generate
from ..eval.items import clusters_of
from ..eval.measurements.fluency import reverse_perplexity
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


@dataclass(frozen=True)
class Reader:
    """A model that says how expected the replies are to it."""

    source: ModelSource | ModelInMemory
    name: str | None
    """What tables call it; None for the base."""


def heard(
    readers: Sequence[Reader],
    grading: Grading | None,
    concept: Concept,
    replies: Sequence[Sequence[Reply]],
    device: torch.device,
    dtype: torch.dtype,
    events: Events,
) -> tuple[list[list[Scores]], list[str]]:
    """Let every reader and every judge hear every model's replies. What reads and grades from the same files is loaded
    once.

    Args:
        readers: Who reads, the base included.
        grading: Rubric and judges.
        concept: The pack whose prompts on the concept were asked.
        replies: Of each model, one for each of these prompts.
        device: Where models on this machine compute.
        dtype: What they compute in.
        events: For progress.

    Returns:
        Scores of each model, first what was read and then grades, and sentences on what it cost and what could not be
        read.
    """
    prompts = [prompt for prompt in concept.prompts if prompt.split == "concept"]
    judges = grading.judges if grading else ()
    read: dict[int, list[list[Scores]]] = {}
    graded: dict[int, Graded] = {}
    for source in {_files(one): one for one in (*(reader.source for reader in readers), *judges)}.values():
        with ExitStack() as stack:
            loaded = None
            if not isinstance(source, JudgeServer):
                with events.stage(f"load {source.name} as a judge"):
                    loaded = stack.enter_context(opened(source, device, dtype))
            for place, reader in enumerate(readers):
                if loaded is not None and _files(reader.source) == _files(source):
                    with events.stage(f"let {reader.source.name} read the replies"):
                        read[place] = [_read(reader, loaded, concept, prompts, of_model) for of_model in replies]
            for place, judge in enumerate(judges):
                if grading is not None and _files(judge) == _files(source):
                    graded[place] = _grade(grading.rubric, judge, loaded, concept, prompts, replies, events)
            # The name would hold this model while the next one is loaded.
            del loaded
    # In the order of the request, whoever was loaded first.
    every = [*(read[place] for place in sorted(read)), *(graded[place].scores for place in sorted(graded))]
    scores = [[one for of_judge in every for one in of_judge[number]] for number in range(len(replies))]
    return scores, [note for place in sorted(graded) for note in graded[place].notes]


def _files(source: ModelSource | ModelInMemory | JudgeServer) -> object:
    """What two names of the same weights share."""
    if isinstance(source, ModelSource):
        return source.folder.resolve()
    return id(source.model if isinstance(source, ModelInMemory) else source)


def _read(
    reader: Reader, loaded: LoadedModel, concept: Concept, prompts: Sequence[Prompt], replies: Sequence[Reply]
) -> list[Scores]:
    ids, clusters = [prompt.id for prompt in prompts], clusters_of(concept, prompts)
    return [reverse_perplexity(loaded.model, loaded.tokenizer, ids, replies, judge=reader.name, clusters=clusters)]


@dataclass(frozen=True)
class Graded:
    """One judge's grades of each model, and sentences on what they cost and what could not be read."""

    scores: list[list[Scores]]
    notes: list[str]


def _grade(
    rubric: Rubric,
    judge: ModelSource | JudgeServer,
    loaded: LoadedModel | None,
    concept: Concept,
    prompts: Sequence[Prompt],
    replies: Sequence[Sequence[Reply]],
    events: Events,
) -> Graded:
    """Let one judge grade every model's replies; a judge behind a server is not loaded."""
    notes = []
    asked = [
        question_for_judge(rubric, prompt, reply.text)
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
            assert loaded is not None, "a judge on this machine"
            replied = generate(loaded.model, loaded.tokenizer, asked, REPLY_TOKENS, stage.advance)
            texts = [reply.text for reply in replied]
    grades = [grades_of(rubric, text) for text in texts]
    if unread := sum(not one for one in grades):
        notes.append(f"No grade could be read in {unread} of {len(asked)} answers of judge {judge.name}.")
    count = len(prompts)
    scores = [
        judged(rubric, judge.name, concept, prompts, of_model, grades[place * count : (place + 1) * count])
        for place, of_model in enumerate(replies)
    ]
    return Graded(scores, notes)


def grades_of(rubric: Rubric, text: str) -> Mapping[str, float]:
    """Grades from what a judge wrote; nothing where there is no JSON object."""
    try:
        return grades_in(rubric, parsed_object(text[text.find("{") : text.rfind("}") + 1]))
    except Unreadable:
        return {}
