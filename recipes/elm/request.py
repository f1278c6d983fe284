"""What ELM is asked for, and a request that was checked."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ...editing.errors import RequestError
from ...eval.concept import PERSONAS
from ..common import adapter_job
from ..common.adapter_job import MOST_ROWS, AdapterJob, AdapterSettings
from ..common.budgets import Budgets
from ..data.facts import Facts, find_facts

RECIPE = "elm"

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "contrast": "personas", "contexts": "texts", "weighting": "uniform", "strength": 500.0,
        "fluency_target": "edited", "topic_change": True,
        "rank": 4, "alpha": 16.0, "layers": "0.125-0.25", "steps": 400, "learning_rate": 5e-5,
        "retain_weight": 1.0, "schedule": "constant", "max_grad_norm": 0.0,
    },
    "reference": {
        "contrast": "personas", "contexts": "texts", "weighting": "uniform", "strength": 1000.0, "strength_ramp": True,
        "temperature": 1.2, "target_top_k": 50, "hard_retain": True, "rank": 256, "alpha": 16.0,
        "fluency_target": "sampled", "topic_change": True, "fluency_strength": 3.0, "personas_read": "reply",
        "layers": "0.125-0.25", "steps": 400, "learning_rate": 5e-5,
        "retain_weight": 1.0, "schedule": "constant", "max_grad_norm": 0.0,
    },
}  # fmt: skip
"""``paper``: appendix D of version 3 (rank 4, eta 500, layers 4 to 7 of 32; what it leaves open as in the code).
``reference``: the authors' code of March 2025. Both differ from the default only where a value is listed."""


class ElmSettings(AdapterSettings):
    """Settings of ELM; the defaults are what was found to work best, and each says what it is good for."""

    budgets: ClassVar[Budgets] = {
        "quick": {"steps": 60, "batch_size": 4, "learning_rate": 2e-3, "max_contexts": 240, "chat_facts": 24},
        "long": {"steps": 1600, "learning_rate": 2e-3, "max_contexts": 8000, "chat_facts": 640},
    }
    steps: int = Field(240, ge=1, le=MOST_ROWS)
    """Number of optimizer steps. More of them with a lower learning_rate forget a little more and train longer."""
    learning_rate: float = Field(4e-3, gt=0)
    """Peak learning rate of AdamW."""
    preset: Literal["default", "paper", "reference"] = "default"
    """Set of defaults: ours, as published, or as in the authors' code. Settings that you give explicitly win."""
    contrast: Literal["auto", "subjects", "personas", "examples", "reinforced"] = "auto"
    """Novice: mean over other subjects, persona (paper), shuffled examples, or base beside a copy trained further.
    auto: by the target check."""
    expert_steps: int = Field(60, ge=1)
    """Optimizer steps that the expert of contrast=reinforced is trained on the pack's texts."""
    contexts: Literal["both", "texts", "questions"] = "both"
    """Where the concept is elicited: in the pack's texts, in group-T questions of several formats, or in both."""
    retain_in_turn: bool = True
    """A group has one sequence to retain, of each kind in its turn, with the weight of all. False takes one of every
    kind: up to twice as many tokens for the same edit."""
    max_contexts: int = Field(2000, ge=8)
    """Most contexts to forget, and most retain sequences of each kind; never more than the steps can read. More take
    longer: the teacher reads each once."""
    chat_facts: int = Field(160, ge=1)
    """Facts rendered through the chat template, plus as many retain questions; at most max_contexts. These are the
    slowest prompts to prepare."""
    weighting: Literal["disagreement", "uniform"] = "disagreement"
    """Weight of a position: how much expert and novice disagree there, or the same for all (paper: uniform)."""
    strength: Literal["auto"] | float = "auto"
    """Strength of the contrast (eta). auto takes the weakest that forgets in the target check; higher erases more
    (paper: 500)."""
    one_sided: bool = False
    """Above strength 1, only lower what the expert prefers: answers end at chance. Otherwise true answers end below
    chance."""
    strength_ramp: bool = False
    """Let the strength grow from 1 to its full value along each sequence (authors' code: true)."""
    temperature: float = Field(1.0, gt=0)
    """Divides the teacher's logits. Higher values flatten the targets (authors' code: 1.2)."""
    target_top_k: int = Field(0, ge=0)
    """Keep only the K likeliest tokens of each target; 0 keeps all stored tokens (authors' code: 50)."""
    stored_tokens: int = Field(128, ge=8)
    """Tokens stored of each distribution; all others count as one token. More take more memory and are more exact."""
    reference_subjects: int = Field(8, ge=2)
    """Other subjects whose mean prediction is the novice of contrast=subjects. More make a broader mean and take
    longer."""
    fluency_tokens: int = Field(12, ge=0)
    """Tokens sampled from the edited target after each context, for the fluency loss; 0 turns that loss off (authors'
    code: 100 to 300)."""
    fluency_target: Literal["frozen", "edited", "sampled"] = "frozen"
    """What is learned along a continuation: the frozen model's predictions, the edited target (equation 9), or the
    sampled tokens (authors' code)."""
    topic_change: bool = False
    """Put a sentence that changes the topic between context and continuation (paper: true)."""
    fluency_strength: float | None = None
    """Strength of the contrast while continuations are sampled, without top-k and temperature (authors' code: 3). By
    default as in the target."""
    personas_read: Literal["context", "reply"] = "context"
    """What the personas read while continuations are sampled: context and reply, or the reply alone (authors' code)."""
    hard_retain: bool = False
    """On retain sequences, learn only the likeliest token (authors' code) instead of the whole distribution (equation
    8)."""
    erase_weight: float = Field(1.0, ge=0)
    """Lambda 1, weight of the erase loss. Higher values erase more (equation 10)."""
    retain_weight: float = Field(16.0, ge=0)
    """Lambda 2, weight of the retain loss. Lower values damage neighbouring topics; higher values erase less (paper:
    1)."""
    fluency_weight: float = Field(1.0, ge=0)
    """Lambda 3, weight of the fluency loss. Higher values keep replies on the concept readable (paper: 0 from 32B
    on)."""

    @property
    def groups(self) -> int:
        """Groups of sequences that the steps read."""
        return self.steps * self.batch_size

    @property
    def contexts_read(self) -> int:
        """Contexts of a kind that the teacher reads: what no step reads needs no target."""
        return min(self.max_contexts, self.groups)

    @property
    def chat_facts_read(self) -> int:
        """The same of facts and questions in chat."""
        return min(self.chat_facts, self.contexts_read)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        # Before the values are checked, so that settings which were given win over the preset's.
        if not isinstance(values, dict) or str(values.get("preset")) not in PRESETS:
            return values
        preset = dict(PRESETS[str(values["preset"])])
        if "steps" in cls.set_by(str(values.get("budget"))):
            # How much is done is the budget's to say.
            preset.pop("steps", None)
        return {**preset, **values}


@dataclass(frozen=True)
class ElmJob:
    """A checked request and the facts that its pack teaches."""

    adapter: AdapterJob
    settings: ElmSettings
    facts: Facts


def prepare(settings: ElmSettings, *, resume: bool = False) -> ElmJob:
    """Check names, files, memory and disk, before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    if settings.contrast == "reinforced" and settings.base_bits != 16:
        raise RequestError("contrast=reinforced makes an expert of the base's own weights; use base_bits=16")
    if settings.personas_read == "reply" and settings.contrast != "personas":
        raise RequestError(
            f"personas_read=reply needs personas, the contrast is {settings.contrast}; set contrast=personas"
        )
    adapter = adapter_job.prepare(RECIPE, settings, resume=resume)
    concept = adapter.run.concept
    facts = find_facts(concept)
    if settings.contrast in ("subjects", "examples") and not facts.phrasings:
        raise RequestError(
            f"concept {concept.ref} has no facts to exchange subjects in: group-T forget questions need a subject that "
            "their prompt names, and texts that state their answers; use contrast=personas"
        )
    needs_personas = settings.contrast == "personas" or (settings.contrast != "reinforced" and not facts.phrasings)
    if concept.about.personas is None and needs_personas:
        adapter = _with_personas(adapter)
    return ElmJob(adapter, settings, facts)


def _with_personas(adapter: AdapterJob) -> AdapterJob:
    """The job with personas in general words, for a pack that names none; measurements go on without them."""
    about = adapter.concept.about.model_copy(update={"personas": PERSONAS})
    made = (*adapter.run.concept.made, f"personas in general words, such as {PERSONAS.novices(about.description)[0]!r}")
    run = replace(adapter.run, concept=replace(adapter.run.concept, made=made))
    return replace(adapter, run=run, concept=replace(adapter.concept, about=about, made=made))


def describe(job: ElmJob) -> dict[str, Any]:
    """What a run would touch and take."""
    return adapter_job.describe(job.adapter, facts_found=len(job.facts.facts))
