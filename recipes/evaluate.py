"""Measure models with a concept pack, all on the same items, beside their base if one is given."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from ..artifacts.checkpoints.read import open_checkpoint
from ..artifacts.concepts import load_concept
from ..artifacts.events import Events
from ..artifacts.judge_server import JudgeServer, find_judge_server, is_address
from ..artifacts.models.dequantized import check_loadable
from ..artifacts.models.find import find_adapter, find_model
from ..artifacts.models.in_memory import opened
from ..artifacts.models.load import choose_device, choose_dtype
from ..artifacts.models.source import ModelInMemory, ModelSource
from ..artifacts.reporting.outcomes import SHOWN_SAMPLES, Evaluation
from ..artifacts.reporting.results import (
    SubjectName,
    about_prompts,
    decoding,
    dominated,
    measurements_as_json,
    not_measured,
    samples,
    summarize_all,
)
from ..artifacts.upgrade import SCHEMA_VERSION
from ..editing.errors import RequestError
from ..editing.modules import language_config
from ..editing.training.packing import packing
from ..eval.concept import Concept
from ..eval.inference.generation import Reply, set_aside
from ..eval.measurements.lm_eval import Tasks, find_tasks
from ..eval.measurements.lm_eval import scores as named_benchmarks
from ..eval.measurements.table import measure, workload
from ..eval.model_under_test import Baseline, EvalSettings, ModelUnderTest
from ..eval.statistics import Scores
from .common.prompt_settings import PromptSettings
from .common.run_record import inputs_of
from .judging import DEFAULT, Grading, Reader, heard, read_rubric

AnyModel = ModelSource | ModelInMemory
LONGEST = 4096
"""Tokens of a suite's reply where no limit was set: each suite has its benchmark's own."""


class EvaluateSettings(PromptSettings):
    """What ``excise eval`` measures, beside the models themselves."""

    concept: str | None = None
    """Concept pack to measure with: builtin:NAME or a folder. A run names its own."""
    base: str | None = None
    """Model that the others were made from, measured on the same items; each value is then compared with it. A run whose
    concept is taken names its own."""
    suite: Literal["auto", "tofu", "muse", "wmdp", "rwku"] | None = None
    """Print the table of a benchmark whose rows the pack holds: tofu, muse, wmdp or rwku; auto takes the one that
    concept.yaml names."""
    reference: str | None = None
    """Model that was trained without what is to be forgotten: forget quality and PrivLeak of a suite compare with it."""
    questions: int = Field(0, ge=0)
    """Measure at most this many questions and retain texts of each split, drawn at random; 0 takes all."""
    max_new_tokens: int = Field(24, ge=1, le=LONGEST)
    """Generate at most this many tokens for each greedy reply."""
    kl_prompts: int = Field(64, ge=1)
    """Measure the divergence from the base on this many neutral prompts and retain texts."""
    as_shipped: bool = False
    """Decode replies as each model's generation_config says, with its penalties, beams and draws; otherwise
    greedily."""
    judge: tuple[str, ...] = ()
    """Further models that read the replies on a concept, each a model or the server and model of an OpenAI-compatible
    API, https://HOST/v1#MODEL; may be repeated."""
    rubric: str | None = None
    """Let judges grade each reply by a rubric: a YAML file, or default. Judges behind a server always do."""
    judge_key: str | None = None
    """Name of the environment variable that holds the key of judges behind a server."""
    lm_eval: tuple[str, ...] = ()
    """Also run benchmarks of the lm-evaluation-harness: task names, or YAML files whose code will run. Separated by
    commas."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type to compute in; auto takes bfloat16 where the device multiplies it faster, else float16 on CUDA, float32 elsewhere."""

    def completed(self, models: Sequence[str | ModelInMemory]) -> Self:
        """With how the runs that made the models rendered their prompts, where nothing was set.

        Raises:
            RequestError: They rendered them differently.
        """
        folders = [
            model for model in models if isinstance(model, str) and Path(model).is_dir() and not find_adapter(model)
        ]
        forms = [run.prompts for model in folders if (run := inputs_of(model))]
        unset = [{key: value for key, value in form.items() if key not in self.model_fields_set} for form in forms]
        for form in unset:
            if differing := [key for key, value in form.items() if value != unset[0].get(key)]:
                raise RequestError(
                    f"the models were made with different {differing[0]} ({unset[0].get(differing[0])!r} and"
                    f" {form[differing[0]]!r}); set {differing[0]}"
                )
        return self.model_copy(update=unset[0]) if unset else self

    @model_validator(mode="after")
    def _check_suite(self) -> Self:
        if self.suite is None and self.reference is not None:
            raise ValueError("reference is used by suites alone; give suite too, or leave it out")
        unused = [name for name in ("judge", "rubric", "lm_eval") if getattr(self, name)] if self.suite else []
        if unused:
            raise ValueError(f"a suite prints the benchmark's table alone, without {unused[0]}; leave one of them out")
        return self

    def measuring(self) -> EvalSettings:
        """How much is measured."""
        tokens = LONGEST if self.suite and "max_new_tokens" not in self.model_fields_set else self.max_new_tokens
        return EvalSettings(tokens, self.kl_prompts, self.questions, self.as_shipped, self.prompt_format())


@dataclass(frozen=True)
class EvaluateJob:
    """A checked request."""

    models: tuple[AnyModel, ...]
    base: AnyModel | None
    concept: Concept
    judges: tuple[ModelSource, ...]
    """Further models that read the replies on a knowledge concept, beside the base."""
    grading: Grading | None
    """The rubric that judges grade the replies on the concept by."""
    tasks: Tasks | None
    settings: EvalSettings
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class MeasuredModel:
    """What is needed of a model once it is unloaded."""

    scores: list[Scores]
    replies: list[Reply]
    """To the prompts on the concept."""
    chat_template: bool
    """Whether it has a chat template; otherwise prompts are plain texts."""
    set_aside: dict[str, Any]
    """What its generation_config asks for and its replies were measured without."""
    baseline: Baseline | None = None
    """Of the base: what other models are compared with."""


def prepare(
    models: Sequence[str | ModelInMemory],
    concept: str | Concept | None,
    base: str | ModelInMemory | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    settings: EvalSettings | None = None,
    judges: Sequence[str] = (),
    rubric: str | None = None,
    judge_key: str | None = None,
    benchmarks: Sequence[str] = (),
) -> EvaluateJob:
    """Check names, files and memory, before any weight is read.

    Args:
        models: One or more, each by reference or in memory.
        concept: None takes concept, and base where there is none, from the records of the runs that made the models.
        judges: Further models that read the replies on a knowledge concept, beside the base; or servers of
            OpenAI-compatible APIs, as ``https://HOST/v1#MODEL``.
        rubric: A YAML file, or ``default``, by which all judges grade the replies; None lets servers alone grade.
        judge_key: Environment variable that holds the servers' key.
        benchmarks: Tasks of the lm-evaluation-harness, by name or YAML file.

    Raises:
        RequestError: Anything that could not work.
    """
    if concept is None:
        concept, of_run = recorded(models)
        base = of_run if base is None else base
    pack = load_concept(concept) if isinstance(concept, str) else concept
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    # The base of an adapter, where it is one.
    adapted = base if isinstance(base, str) else None
    sources = tuple(_find(model, adapted) for model in models)
    before = None if base is None else _find(base)
    servers = tuple(find_judge_server(judge, judge_key) for judge in judges if is_address(judge))
    local = [judge for judge in judges if not is_address(judge)]
    _check_judges(pack, judges, local, rubric)
    readers = tuple(find_model(judge) for judge in local)
    graders: tuple[ModelSource | JudgeServer, ...] = (*(readers if rubric else ()), *servers)
    grading = Grading(read_rubric(rubric or DEFAULT), graders) if graders else None
    for source in (*sources, *readers, *([before] if before else [])):
        _check(source, chosen_device, chosen_dtype)
    tasks = find_tasks(benchmarks) if benchmarks else None
    if not _has_knowledge_prompts(pack):
        readers = ()
    return EvaluateJob(
        sources, before, pack, readers, grading, tasks, settings or EvalSettings(), chosen_device, chosen_dtype
    )


def run(job: EvaluateJob, events: Events) -> Evaluation:
    """Measure the base, then every model on the same items; then let the base and the judges read the replies.

    Raises:
        RequestError: A model has another vocabulary than the base.
    """
    base = None if job.base is None else _measure(job, job.base, None, events)
    measured = [_measure(job, model, base, events) for model in job.models]
    everyone = [*([base] if base else []), *measured]
    notes = _let_judges_work(everyone, job, events)
    return Evaluation(
        tuple(_results(job, source, base, one, notes) for source, one in zip(job.models, measured, strict=True))
    )


def recorded(models: Sequence[str | ModelInMemory]) -> tuple[str, str | None]:
    """Concept and base of the runs that made the models.

    Raises:
        RequestError: No run made one of them, or runs were about different concepts.
    """
    runs = [run for model in models if isinstance(model, str) and (run := inputs_of(model))]
    if not runs:
        raise RequestError(
            "concept is missing; give --concept builtin:NAME or a folder, because no record of a run beside"
            f" {getattr(models[0], 'name', models[0])} names one"
        )
    concepts, bases = {run.known("concept"): None for run in runs}, {run.base: None for run in runs}
    if len(concepts) > 1:
        raise RequestError(f"the models were made for different concepts, {', '.join(concepts)}; give --concept")
    return next(iter(concepts)), next(iter(bases)) if len(bases) == 1 else None


def _check_judges(pack: Concept, judges: Sequence[str], local: Sequence[str], rubric: str | None) -> None:
    """Check that judges have something to read, and a rubric somebody who grades by it."""
    if rubric and not judges:
        raise RequestError(
            f"rubric={rubric} needs a judge who grades by it; give --judge MODEL or https://HOST/v1#MODEL"
        )
    if local and not rubric and not _has_knowledge_prompts(pack):
        raise RequestError(
            f"concept {pack.ref} has no prompts on knowledge whose replies a judge could read; leave out the judges"
        )
    if judges and not any(prompt.split == "concept" for prompt in pack.prompts):
        raise RequestError(f"concept {pack.ref} has no prompts whose replies a judge could grade; leave out the judges")


def checked(model: str | ModelInMemory, device: torch.device, dtype: torch.dtype) -> AnyModel:
    """A further model, found and checked before its weights are read.

    Raises:
        RequestError: Nothing has that name, or it could not be loaded.
    """
    source = _find(model)
    _check(source, device, dtype)
    return source


def _check(source: AnyModel, device: torch.device, dtype: torch.dtype) -> None:
    if isinstance(source, ModelSource):
        check_loadable(open_checkpoint(source.folder), device, dtype)


def describe(job: EvaluateJob) -> dict[str, Any]:
    """What an evaluation would touch."""
    counts = {
        "questions": job.concept.questions,
        "open questions": job.concept.open_questions,
        "prompts": job.concept.prompts,
        "passages": job.concept.passages,
        "forget texts": job.concept.forget,
        "retain texts": job.concept.retain,
        "unseen texts": job.concept.unseen,
        "member texts": job.concept.members,
    }
    return {
        "models": [model.describe() for model in job.models],
        "base": job.base.describe() if job.base else None,
        "concept": job.concept.ref,
        "rows": {name: len(rows) for name, rows in counts.items() if rows},
        "device": str(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
    }


def _find(model: str | ModelInMemory, base: str | None = None) -> AnyModel:
    return find_model(model, base) if isinstance(model, str) else model


def _has_knowledge_prompts(concept: Concept) -> bool:
    return concept.about.kind == "knowledge" and any(prompt.split == "concept" for prompt in concept.prompts)


def _measure(job: EvaluateJob, source: AnyModel, base: MeasuredModel | None, events: Events) -> MeasuredModel:
    """Every measurement of the table on one model, compared with the base where there is one."""
    baseline = base.baseline if base else None
    with ExitStack() as stack:
        with events.stage(f"load {source.name}"):
            loaded = stack.enter_context(opened(source, job.device, job.dtype, job.settings.prompts))
        with events.stage(f"measure {source.name}", workload(job.concept, job.settings)) as stage:
            subject = ModelUnderTest(loaded.model, loaded.tokenizer, job.concept, job.settings, baseline, stage.advance)
            if (
                baseline is not None
                and baseline.distributions[0].vocabulary != language_config(loaded.model).vocab_size
            ):
                raise RequestError(
                    f"{source.name} has another vocabulary than its base; give the base that it was made from"
                )
            with packing(subject.model):
                scores = measure(subject)
            # Only the base is compared with.
            own_baseline = subject.baseline() if source is job.base else None
            replies = subject.replies("concept")
            has_template = bool(loaded.tokenizer.chat_template)
        if job.tasks:
            with events.stage(f"let {source.name} do {', '.join(job.tasks.names)}"):
                scores += named_benchmarks(loaded.model, loaded.tokenizer, job.tasks, job.settings.questions)
        aside = {} if job.settings.as_shipped else set_aside(loaded.model)
    return MeasuredModel(scores, replies, has_template, aside, own_baseline)


def _let_judges_work(measured: Sequence[MeasuredModel], job: EvaluateJob, events: Events) -> list[str]:
    """Add what the base and the judges read in the replies, and the judges' grades; sentences on what grades cost."""
    readers = [Reader(judge, judge.name) for judge in job.judges]
    if job.base is not None and _has_knowledge_prompts(job.concept):
        readers.insert(0, Reader(job.base, None))
    replies = [one.replies for one in measured]
    found, notes = heard(readers, job.grading, job.concept, replies, job.device, job.dtype, events)
    for one, scores in zip(measured, found, strict=True):
        one.scores.extend(scores)
    return notes


def _results(
    job: EvaluateJob, source: AnyModel, base: MeasuredModel | None, measured: MeasuredModel, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """What ``eval.json`` would hold of one model."""
    scores: dict[SubjectName, Sequence[Scores]] = {"base": base.scores} if base else {}
    scores["edited"] = measured.scores
    aside = decoding(measured.set_aside, remedy=" --as-shipped measures with it.")
    on_prompts = about_prompts(
        {**({"the base": {"concept": base.replies}} if base else {}), source.name: {"concept": measured.replies}},
        template=measured.chat_template,
        kind=job.concept.about.kind,
        tokens=job.settings.max_new_tokens,
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "base": job.base.describe() if job.base else None,
        "edited": source.describe(),
        "concept": {"ref": job.concept.ref, "name": job.concept.about.name, "sha256": job.concept.sha256},
        "measurements": measurements_as_json(summarize_all(scores)),
        "decoding": {"as_shipped": job.settings.as_shipped, "set_aside": measured.set_aside},
        "prompts": {**job.settings.prompts.as_json(), "chat_template": measured.chat_template},
        "warnings": [*on_prompts, *not_measured(scores), *dominated(scores), *([aside] if aside else []), *notes],
        "samples": samples({"concept": base.replies}, {"concept": measured.replies}, SHOWN_SAMPLES) if base else [],
    }
