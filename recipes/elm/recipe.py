"""ELM: erase a concept with low-rank updates (Gandikota et al. 2024, arXiv 2410.02760).

The frozen model is its own teacher: what it predicts in a context, less what an expert predicts there, plus what a
novice does. An adapter is trained toward that on contexts that elicit the concept, toward the frozen model itself on
everything that must stay, and along continuations sampled from the edited target so that replies stay fluent.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ...artifacts.checkpoints.tensor_cache import TensorCache, scope_of
from ...artifacts.events import Events
from ...artifacts.models.cache import cache_folder
from ...artifacts.models.load import LoadedModel
from ...editing.errors import EditError, RequestError
from ..common import adapter_run
from ..common.adapter_run import AdapterSettings, TrainingPlan
from ..common.measured_run import Finished
from ..common.tokens import text_limit
from ..data.facts import Facts, find_facts
from .batches import arrange, collate, part_size, sequence_loss
from .contrast import ContrastSource, ReinforcedContrast, contrast_sources
from .reinforced_expert import reinforced
from .target_check import TargetCheck, check_target
from .teacher import Teacher
from .training_data import Recipe, Replies, TrainingData, forget_contexts, forget_sequences, retain_sequences

RECIPE = "elm"

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "contrast": "personas", "contexts": "texts", "weighting": "uniform", "strength": 500.0, "rank": 4, "alpha": 16.0,
        "layers": "0.125-0.25", "learning_rate": 5e-5, "retain_weight": 1.0, "schedule": "constant", "max_grad_norm": 0.0,
    },
    "reference": {
        "contrast": "personas", "contexts": "texts", "weighting": "uniform", "strength": 1000.0, "strength_ramp": True,
        "temperature": 1.2, "target_top_k": 50, "hard_retain": True, "rank": 256, "alpha": 16.0,
        "layers": "0.125-0.25", "learning_rate": 5e-5, "retain_weight": 1.0, "schedule": "constant", "max_grad_norm": 0.0,
    },
}  # fmt: skip
"""``paper``: appendix D of version 3 (rank 4, eta 500, layers 4 to 7 of 32; what it leaves open as in the code).
``reference``: the authors' code of March 2025. Both differ from the default only where a value is listed."""


class ElmSettings(AdapterSettings):
    """Settings of ELM; the defaults are what was found to work best, and each says what it is good for."""

    preset: Literal["default", "paper", "reference"] = "default"
    """paper and reference set other defaults, as published and as in the authors' code; keys given explicitly win."""
    contrast: Literal["auto", "subjects", "personas", "examples", "reinforced"] = "auto"
    """Novice: the mean over other subjects in the same words, a persona (paper), or examples whose answers are shuffled
    against examples that are right; or the model itself against one trained further on the pack's texts (reinforced). auto
    takes what the target check prefers of those that need no training."""
    expert_steps: int = Field(60, ge=1)
    """Steps that the expert of contrast=reinforced is trained."""
    contexts: Literal["both", "texts", "questions"] = "both"
    """Where the concept is elicited: the pack's texts, group-T questions in several formats, or both."""
    max_contexts: int = Field(2000, ge=8)
    """Contexts to forget, and retain sequences of each kind, at most; each is read by the teacher once."""
    chat_facts: int = Field(160, ge=1)
    """Facts, and as many questions to retain, that are asked in the chat template; their contexts are the dearest."""
    weighting: Literal["disagreement", "uniform"] = "disagreement"
    """Weight of a position: how much expert and novice disagree there, or the same for all (paper)."""
    strength: Literal["auto"] | float = "auto"
    """Strength of the contrast; auto takes the weakest that the target check finds to forget (paper: 500)."""
    one_sided: bool = False
    """Beyond strength 1 only push down what the expert prefers. Then the model ends at chance, as one that never knew
    would; two-sided, each fact gets answers of its own that are wrong, and the true one falls below chance."""
    strength_ramp: bool = False
    """Let the strength grow from 1 to the full strength along a sequence (authors' code)."""
    temperature: float = Field(1.0, gt=0)
    """Divides the teacher's logits (authors' code: 1.2)."""
    target_top_k: int = Field(0, ge=0)
    """Keep only so many tokens of a target; 0 keeps all that were stored (authors' code: 50)."""
    stored_tokens: int = Field(128, ge=8)
    """Tokens of each distribution that are stored; the rest counts as one. The share left over is reported."""
    reference_subjects: int = Field(8, ge=2)
    """Other subjects whose mean is the novice of contrast=subjects."""
    fluency_tokens: int = Field(12, ge=0)
    """Tokens that are sampled from the edited target after a context, for the fluency term."""
    hard_retain: bool = False
    """Keep only the likeliest token on retain sequences (authors' code) instead of the distribution (equation 8)."""
    erase_weight: float = Field(1.0, ge=0)
    """Lambda 1 (equation 10)."""
    retain_weight: float = Field(16.0, ge=0)
    """Lambda 2, of the mean over the kinds of retain sequences (paper: 1). Less loses neighbours, more forgets less."""
    fluency_weight: float = Field(1.0, ge=0)
    """Lambda 3 (paper: 0 for models of 32B and more)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") in PRESETS:
            return {**PRESETS[values["preset"]], **values}
        return values


@dataclass(frozen=True)
class ElmJob:
    """A checked request and the facts that its pack teaches."""

    adapter: adapter_run.AdapterJob
    settings: ElmSettings
    facts: Facts


def prepare(settings: ElmSettings, *, resume: bool = False) -> ElmJob:
    """Check names, files, memory and disk, before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    if settings.contrast == "reinforced" and settings.base_bits != 16:
        raise RequestError("contrast=reinforced makes an expert of the base's own weights; use base_bits=16")
    checked = adapter_run.prepare(RECIPE, settings, resume=resume)
    concept = checked.job.concept
    facts = find_facts(concept)
    if settings.contrast in ("subjects", "examples") and not facts.phrasings:
        raise RequestError(
            f"concept {concept.ref} has no facts to exchange subjects in: group-T forget questions need a subject that "
            "their prompt names, and texts that state their answers; use contrast=personas"
        )
    needed = settings.contrast == "personas" or (settings.contrast != "reinforced" and not facts.phrasings)
    if concept.about.personas is None and needed:
        raise RequestError(
            f"concept {concept.ref} has no personas for an expert and a novice; add personas to concept.yaml, or --set contrast=reinforced"
        )
    return ElmJob(checked, settings, facts)


def describe(prepared: ElmJob) -> dict[str, Any]:
    """What a run would touch and take."""
    return adapter_run.describe(prepared.adapter, facts_found=len(prepared.facts.facts))


def run(prepared: ElmJob, events: Events) -> Finished:
    """Do the whole run: check the target, read the teacher, train, merge, measure, publish."""
    return adapter_run.run(
        prepared.adapter, lambda loaded, seen, work: _lessons(prepared, loaded, seen, work), "erased with ELM", events
    )


def _lessons(prepared: ElmJob, loaded: LoadedModel, events: Events, work: Path) -> TrainingPlan:
    settings = prepared.settings
    expert = _expert(prepared, loaded, events, work)
    read = partial(Teacher, loaded.model, kept=_kept(prepared), expert=expert)
    check, source = _choose(prepared, loaded, read, events)
    strength = check.best.strength
    recipe = Recipe(
        strength, settings.one_sided, settings.strength_ramp, settings.temperature, settings.target_top_k, settings.stored_tokens, settings.contexts,
        settings.weighting, settings.hard_retain, settings.fluency_tokens, settings.chat_facts, settings.max_contexts, settings.seed,
    )  # fmt: skip
    curriculum = _teach(prepared, loaded, read, source, recipe, events)
    weights = {"erase": settings.erase_weight, "fluency": settings.fluency_weight, "retain": settings.retain_weight}
    training = {
        "about": f"Contrast `{source.name}` at strength {strength:g}.", "contrast": source.name, "strength": strength,
        "steps": settings.steps, "rows": settings.batch_size * len(curriculum.lessons),
        "data": f"{curriculum.contexts} contexts elicit the concept, from {len(prepared.facts.facts)} facts found in the pack",
        **curriculum.describe(),
    }  # fmt: skip
    return TrainingPlan(
        arrange(curriculum.lessons, settings.steps * settings.batch_size, settings.seed),
        partial(collate, most=part_size(loaded.model)), sequence_loss(weights),
        [lesson.ids for lessons in curriculum.lessons.values() for lesson in lessons[:8]], training,
        {"target_check": check.describe(), "warnings": [*prepared.adapter.warnings, *_warnings(check, curriculum, settings.strength)]},
    )  # fmt: skip


def _expert(
    prepared: ElmJob, loaded: LoadedModel, events: Events, work: Path
) -> Callable[[], AbstractContextManager[object]]:  # fmt: skip
    """Where an expert is to be trained, the context in which the model is one."""
    settings = prepared.settings
    if settings.contrast != "reinforced":
        return nullcontext
    with events.stage("train an expert", settings.expert_steps) as stage:
        return reinforced(
            loaded,
            prepared.adapter.concept,
            settings.expert_steps,
            text_limit(loaded.model),
            settings.seed,
            stage,
            work,
        )


def _choose(
    prepared: ElmJob, loaded: LoadedModel, read: Callable[..., Teacher], events: Events
) -> tuple[TargetCheck, ContrastSource]:  # fmt: skip
    """Check what every contrast promises, at the strength that was asked for or the one that the check prefers."""
    job, settings = prepared.adapter.job, prepared.settings
    sources = contrast_sources(
        job.concept, prepared.facts, loaded.tokenizer, settings.reference_subjects, settings.seed
    )
    if settings.contrast == "reinforced":
        sources = [ReinforcedContrast(loaded.tokenizer)]
    elif settings.contrast != "auto":
        sources = [source for source in sources if source.name == settings.contrast]
    with events.stage("check the target") as stage:
        check = check_target(
            read(advance=stage.advance),
            loaded.tokenizer,
            job.concept,
            prepared.facts,
            sources,
            one_sided=settings.one_sided,
            strength=None if settings.strength == "auto" else settings.strength,
        )
        stage.advance(0, forget=check.best.accuracy["forget"], strength=check.best.strength)
    source = next(source for source in sources if source.name == check.best.contrast)
    return check, source


def _teach(
    prepared: ElmJob, loaded: LoadedModel, read: Callable[..., Teacher], source: ContrastSource, recipe: Recipe, events: Events
) -> TrainingData:  # fmt: skip
    """All lessons, each teacher's prediction computed once."""
    job, concept, tokenizer = prepared.adapter.job, prepared.adapter.concept, loaded.tokenizer
    limit = text_limit(loaded.model)
    reply = Replies(loaded.model, tokenizer, job.settings.max_new_tokens, recipe.seed)
    with events.stage("read the teacher") as stage:
        contexts = forget_contexts(concept, _facts_for(prepared, source), tokenizer, reply, recipe, limit)
        teacher = read(advance=stage.advance)
        forget, without, left_over = forget_sequences(teacher, tokenizer, contexts, source, recipe)
        teacher.forget()
        keep, skipped = retain_sequences(teacher, tokenizer, concept, prepared.facts, reply, recipe, limit)
    if not forget:
        raise EditError(f"no context of concept {job.concept.ref} has a contrast under {source.name}; try another")
    return TrainingData({"forget": forget, **keep}, len(contexts), without, left_over, skipped)


def _kept(prepared: ElmJob) -> TensorCache | None:
    """Where the teacher's work is kept; a 4-bit base computes something else and is not kept."""
    job = prepared.adapter.job
    if prepared.settings.base_bits != 16:
        return None
    return TensorCache(cache_folder() / "teacher", scope_of(job.source.folder, job.dtype, job.device))


def _facts_for(prepared: ElmJob, source: ContrastSource) -> Facts:
    """A persona reads whole texts, as published, where texts alone are asked for."""
    whole = source.lasting and prepared.settings.contexts == "texts"
    return Facts((), {}) if whole else prepared.facts


def _warnings(check: TargetCheck, curriculum: TrainingData, strength: float | str) -> list[str]:
    found = []
    if not check.separates:
        tried = (
            "No contrast and strength that was tried makes"
            if strength == "auto"
            else f"At strength {strength:g} no contrast makes"
        )
        found.append(
            f"{tried} the target forget the concept and keep its neighbours; the widest gap was taken. Expect little effect, "
            "or damage."
        )
    if curriculum.without_contrast:
        found.append(f"{curriculum.without_contrast} contexts offered no contrast and were left out.")
    return found
