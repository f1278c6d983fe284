"""Measure models on a benchmark that a pack holds, and print the benchmark's own table."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ...artifacts.concepts import load_concept
from ...artifacts.events import Events
from ...artifacts.models.in_memory import opened
from ...artifacts.models.source import ModelInMemory
from ...editing.errors import RequestError, counted
from ...eval.concept import Concept
from ...eval.model_under_test import EvalSettings, ModelUnderTest
from .. import evaluate
from ..evaluate import LONGEST, AnyModel, EvaluateJob
from . import SUITES, suite_module
from .figures import CUT, Raw, SuiteTable

INTERVALS = (
    "Brackets are 95% intervals, in which items on one subject count as belonging together; […, …] where fewer than five"
    " subjects, or items that are all alike, allow none."
)


@dataclass(frozen=True)
class SuiteJob:
    """A checked request."""

    suite: str
    evaluation: EvaluateJob
    """Models, base, concept and settings."""
    reference: AnyModel | None
    """A model that was trained without what is to be forgotten."""


def prepare(
    models: Sequence[str | ModelInMemory],
    concept: str | Concept | None,
    suite: str,
    base: str | ModelInMemory | None = None,
    reference: str | ModelInMemory | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    settings: EvalSettings | None = None,
) -> SuiteJob:
    """Check the pack, names, files and memory, before any weight is read.

    Args:
        models: One or more, each by reference or in memory.
        concept: None takes that of the runs that made the models.
        suite: One of ``SUITES``, or ``auto`` for what the pack's concept.yaml names.
        base: The model that the others were made from; measured beside them.
        reference: A model that never learned what is to be forgotten; forget quality and PrivLeak need it.

    Raises:
        RequestError: Anything that could not work, such as a pack that lacks what the suite asks.
    """
    if concept is None:
        concept, recorded = evaluate.recorded(models)
        base = recorded if base is None else base
    pack = load_concept(concept) if isinstance(concept, str) else concept
    name = _named(suite, pack)
    for require in suite_module(name).PACKAGES:
        require(f"the {name} suite")
    if lacking := suite_module(name).needs(pack):
        raise RequestError(
            f"the {name} suite needs {'; '.join(lacking)}, which concept {pack.ref} does not have; add the rows to the"
            " pack, or leave out --suite"
        )
    chosen = settings or EvalSettings(max_new_tokens=LONGEST)
    evaluation = evaluate.prepare(models, pack, base, device=device, dtype=dtype, settings=chosen)
    known = None if reference is None else evaluate.checked(reference, evaluation.device, evaluation.dtype)
    return SuiteJob(name, evaluation, known)


def _named(suite: str, concept: Concept) -> str:
    if suite != "auto":
        return suite
    if concept.about.suite is None:
        raise RequestError(
            f"--suite auto: the concept.yaml of {concept.ref} names no suite; give --suite {', '.join(SUITES)}"
        )
    return concept.about.suite


def describe(job: SuiteJob) -> dict[str, Any]:
    """What a run would touch."""
    plan = evaluate.describe(job.evaluation)
    known = None if job.reference is None else job.reference.describe()
    return {"suite": job.suite, **plan, "reference": known, "asks": suite_module(job.suite).FORMAT}


def run(job: SuiteJob, events: Events) -> SuiteTable:
    """Measure base, models and reference on the same items."""
    evaluation, suite = job.evaluation, suite_module(job.suite)
    base = None if evaluation.base is None else _measure(job, evaluation.base, events)
    measured = [_measure(job, model, events) for model in evaluation.models]
    reference = None if job.reference is None else _measure(job, job.reference, events)
    columns: dict[str, Raw] = {} if base is None else {"base": base}
    for model, raw in zip(evaluation.models, measured, strict=True):
        columns[_free(model.name, columns)] = raw
    if reference is not None:
        columns["reference"] = reference
    # The reference is not held against itself: what compares with it is a figure of the others alone.
    tables = {
        name: suite.figures(raw, base, reference if raw is not reference else None) for name, raw in columns.items()
    }
    return SuiteTable(job.suite, evaluation.concept.ref, tables, tuple(_notes(job, columns)))


def _free(name: str, taken: dict[str, Raw]) -> str:
    number, free = 2, name
    while free in taken or free == "reference":
        free, number = f"{name} ({number})", number + 1
    return free


def _measure(job: SuiteJob, source: AnyModel, events: Events) -> Raw:
    evaluation = job.evaluation
    with ExitStack() as stack:
        with events.stage(f"load {source.name}"):
            loaded = stack.enter_context(
                opened(source, evaluation.device, evaluation.dtype, evaluation.settings.prompts)
            )
        with events.stage(f"measure {source.name} on {job.suite}") as stage:
            subject = ModelUnderTest(
                loaded.model, loaded.tokenizer, evaluation.concept, evaluation.settings, None, stage.advance
            )
            raw: Raw = suite_module(job.suite).measure(subject)
    return raw


def _notes(job: SuiteJob, columns: Mapping[str, Raw]) -> list[str]:
    """How prompts were asked, and whatever a reader of the table must know beside it."""
    notes, settings = [suite_module(job.suite).FORMAT], job.evaluation.settings
    if job.suite == "wmdp":
        notes += [line for line in job.evaluation.concept.made if line.startswith("choices")]
    for name, raw in columns.items():
        notes += [
            f"Not measured on {name}: {key}; none of {counted(scores.skipped, 'item', 'items')} could be scored."
            for key, scores in raw.items()
            if scores.is_empty and scores.skipped
        ]
        if CUT in raw and (count := round(sum(raw[CUT].totals))):
            notes.append(
                f"The beginning was cut off {count} of {len(raw[CUT].ids)} prompts, which {name} cannot read whole."
            )
    if settings.questions:
        notes.append(f"Drawn at random over subjects: at most {settings.questions} of each set's items (--questions).")
    if settings.max_new_tokens < LONGEST:
        notes.append(f"Replies have at most {counted(settings.max_new_tokens, 'token', 'tokens')} (max_new_tokens).")
    if settings.as_shipped:
        notes.append("Replies were decoded as each model's generation_config says, not greedily (--as-shipped).")
    if job.reference is None and job.suite in ("tofu", "muse"):
        missing = "Forget quality" if job.suite == "tofu" else "PrivLeak"
        notes.append(f"{missing} needs --reference MODEL, a model that was trained without what is to be forgotten.")
    if job.evaluation.base is None and job.suite == "wmdp":
        notes.append("The robust figure needs --base MODEL, whose guesses from the options alone are left out.")
    return [*notes, INTERVALS]
