"""Measure any model with a concept pack, beside its base if one is given."""

from collections.abc import Sequence
from typing import Any

from ..artifacts.checkpoints.read import open_checkpoint
from ..artifacts.concepts import load_concept
from ..artifacts.events import Events
from ..artifacts.models.find import find_model
from ..artifacts.models.load import choose_device, choose_dtype, load_model
from ..artifacts.models.memory import check_memory
from ..artifacts.models.source import ModelSource
from ..artifacts.reporting.results import SubjectName, measurements_as_json, summarize_all
from ..artifacts.upgrade import SCHEMA_VERSION
from ..editing.errors import RequestError
from ..eval.inference.generation import Reply
from ..eval.measurements.fluency import reverse_perplexity
from ..eval.measurements.lm_eval import find_tasks
from ..eval.measurements.lm_eval import scores as named_benchmarks
from ..eval.measurements.table import measure, workload
from ..eval.model_under_test import Baseline, EvalSettings, ModelUnderTest
from ..eval.statistics import Scores


def run(
    model: str,
    concept_ref: str,
    base: str | None,
    device_name: str,
    dtype_name: str,
    settings: EvalSettings,
    events: Events,
    judges: Sequence[str] = (),
    benchmarks: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what ``eval.json`` would hold: measurements of the model, and of its base on the same items.

    Args:
        judges: Further models that read the replies on a knowledge concept, beside the base.
        benchmarks: Tasks of the lm-evaluation-harness, by name or YAML file.

    Raises:
        RequestError: Anything that could not work, found before a model is loaded.
    """
    concept = load_concept(concept_ref)
    device = choose_device(device_name)
    dtype = choose_dtype(dtype_name, device)
    sources: list[tuple[SubjectName, ModelSource]] = [("base", find_model(base))] if base else []
    sources.append(("edited", find_model(model)))
    reading = [find_model(judge) for judge in judges]
    if reading and (concept.about.kind != "knowledge" or not any(p.split == "concept" for p in concept.prompts)):
        raise RequestError(
            f"concept {concept.ref} has no prompts on knowledge whose replies a judge could read; leave out --judge"
        )
    for source in (*(source for _, source in sources), *reading):
        check_memory(open_checkpoint(source.folder), device, dtype)
    tasks = find_tasks(benchmarks) if benchmarks else None
    scores: dict[SubjectName, list[Scores]] = {}
    replies: dict[SubjectName, list[Reply]] = {}
    baseline: Baseline | None = None
    for name, source in sources:
        with events.stage(f"load {source.name}"):
            loaded = load_model(source, device, dtype)
        with events.stage(f"measure {source.name}", workload(concept, settings)) as stage:
            subject = ModelUnderTest(loaded.model, loaded.tokenizer, concept, settings, baseline, stage.advance)
            if baseline is not None and baseline.log_probabilities[0].shape[-1] != loaded.model.config.vocab_size:
                raise RequestError(
                    f"{source.name} has another vocabulary than its base; give the base that it was made from"
                )
            scores[name] = measure(subject)
            baseline = subject.baseline() if name == "base" else baseline
            replies[name] = subject.replies("concept")
        if tasks:
            with events.stage(f"let {source.name} do {', '.join(tasks.names)}"):
                scores[name] += named_benchmarks(loaded.model, loaded.tokenizer, tasks, settings.questions)
        del loaded, subject
    by_base = [sources[0][1]] if base and concept.about.kind == "knowledge" and replies["base"] else []
    ids = [prompt.id for prompt in concept.prompts if prompt.split == "concept"]
    for source, by in (*((source, None) for source in by_base), *((source, source.name) for source in reading)):
        with events.stage(f"let {source.name} read the replies"):
            judge = load_model(source, device, dtype)
            for name, said in replies.items():
                scores[name].append(reverse_perplexity(judge.model, judge.tokenizer, ids, said, judge=by))
            del judge
    return {
        "schema_version": SCHEMA_VERSION,
        "base": sources[0][1].describe() if base else None,
        "edited": sources[-1][1].describe(),
        "concept": {"ref": concept.ref, "name": concept.about.name, "sha256": concept.sha256},
        "measurements": measurements_as_json(summarize_all(scores)),
    }
