"""ELM: erase a concept with low-rank updates (Gandikota et al. 2024, arXiv 2410.02760).

The frozen model is its own teacher: what it predicts in a context, less what an expert predicts there, plus what a
novice does. An adapter is trained toward that on contexts that elicit the concept, toward the frozen model itself on
everything that must stay, and along continuations sampled from the edited target so that replies stay fluent.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from ...artifacts.checkpoints.tensor_cache import TensorCache, scope_of
from ...artifacts.events import Events
from ...artifacts.models.cache import cache_folder
from ...artifacts.models.load import LoadedModel
from ...editing.edits.base import WeightEdit
from ...editing.errors import EditError, counted
from ...editing.training.packing import packing
from ...eval.inference.chat import encode_prompt
from ...eval.inference.likelihood import tokens_of_batch
from ...eval.inference.lockstep import cached_bytes
from ..common import adapter_run
from ..common.measured_run import Finished
from ..common.memory_plan import MemoryPlan, RunMemory, tokens_at_once
from ..common.memory_sizes import Rows
from ..common.prefix_cache import READ
from ..common.tokens import encode, pieces
from ..data.facts import bare_question, question_contexts
from ..data.unlearning_sets import forget_examples
from .batches import TARGET_BYTES, SequenceTraining, arrange, largest_part, part_size, sequence_loss
from .contrast import ContrastSource, contrast_sources
from .decoding import ROWS, cache_budget
from .erasure import Erasure
from .forget_data import ForgetData, forget_contexts, forget_sequences
from .reinforced_expert import reinforced
from .remembered import SHARE
from .replies import CHAT_PROMPTS
from .request import ElmJob, ElmSettings, describe, prepare
from .retain_data import RetainData, retain_sequences
from .story import story
from .target_check import TargetCheck, check_target
from .teacher import ExpertContext, Teacher

__all__ = ["ElmSettings", "describe", "learn", "memory", "prepare", "run", "story"]


def memory(job: ElmJob) -> MemoryPlan:
    """What a run would hold in memory."""
    needs, settings, concept = RunMemory.of(job.adapter.run), job.settings, job.adapter.concept
    sizes, run = needs.sizes, job.adapter.run
    texts = concept.texts()
    longest = needs.longest((*texts, *(q.prompt for q in concept.questions)), needs.text_limit)
    on_cpu = run.device.type == "cpu"
    read = max(1, (READ if on_cpu else 4 * tokens_of_batch(sizes.vocabulary, run.device)) // longest)
    # Of every token that is to be retained the teacher's last hidden state, then its likeliest tokens.
    positions = needs.tokens(texts[: 2 * settings.contexts_read])
    left = max(0, needs.room - needs.weights)
    teacher = min(positions * sizes.width * run.dtype.itemsize, int(SHARE * left))
    targets = positions * settings.stored_tokens * TARGET_BYTES
    cache = cache_budget(run.device, left)
    kinds = _lengths(job, needs) if needs.tokenizes() else [[longest + settings.fluency_tokens], *[[longest]] * 3]
    # Contexts are continued as bare, expert and novice at once; what is to be retained is only read.
    context = max(kinds[0], default=longest)
    rows = min(ROWS, 3 * settings.contexts_read, max(1, cache // (context * cached_bytes(sizes.model))))
    largest = max(Rows(rows, context), Rows(read, longest), key=lambda one: one.tokens)
    decode = needs.reading("read the teacher", largest, cached=True, kept=teacher + targets)
    most = part_size(run.device)
    part = largest_part(
        kinds, settings.steps, settings.batch_size, most, settings.seed, in_turn=settings.retain_in_turn
    )
    # Gradients of the parts are summed beside those of the step.
    summed = 4 * sizes.adapter(job.adapter.shape)
    return needs.measured_run([decode, needs.training(job.adapter, part, kept=targets, work=summed)])


def _lengths(job: ElmJob, needs: RunMemory) -> list[list[int]]:
    """Tokens of the sequences of each kind, as they are before the teacher has replied to any."""
    settings, concept, tokenizer = job.settings, job.adapter.concept, needs.tokenizer
    forget = forget_examples(concept, job.facts, tokenizer, settings.seed, needs.text_limit)
    kinds = [[len(one.ids) + settings.fluency_tokens for one in forget]]
    texts = [encode(tokenizer, text.text, True) for text in concept.retain]
    kinds.append([len(piece) for row in texts for piece in pieces(row, needs.text_limit)])
    if settings.contexts == "texts":
        return kinds
    others = [q for q in concept.questions if q.split != "forget" and q.group == "T"]
    kinds.append([len(encode(tokenizer, one.text, True)) for one in question_contexts(others, settings.seed)])
    if tokenizer.chat_template:
        prompts = [*CHAT_PROMPTS, *(bare_question(q.prompt) for q in others)]
        kinds.append([len(encode_prompt(tokenizer, prompt)) + settings.max_new_tokens for prompt in prompts])
    return kinds


def run(job: ElmJob, events: Events) -> Finished:
    """Do the whole run: check the target, read the teacher, train, merge, measure, publish."""
    return adapter_run.run(job.adapter, "erased with ELM", partial(_training, job), events)


def learn(job: ElmJob, loaded: LoadedModel, events: Events, work: Path, _: dict[str, Any]) -> WeightEdit:
    """The edit alone, for a search; the base is unchanged afterwards."""
    return adapter_run.learn(job.adapter, loaded, partial(_training, job), work, events)


def _training(job: ElmJob, loaded: LoadedModel, events: Events, work: Path) -> "ElmTraining":
    """Everything before the first gradient step."""
    # What contexts begin with is read once for all of them, where the model can.
    with packing(loaded.model):
        return _prepared(job, loaded, events, work)


def _prepared(job: ElmJob, loaded: LoadedModel, events: Events, work: Path) -> "ElmTraining":
    settings = job.settings
    expert: ExpertContext = nullcontext
    if settings.contrast == "reinforced":
        with events.stage("train an expert", settings.expert_steps) as stage:
            expert = reinforced(loaded, job.adapter.concept, settings, stage, work)
    teacher = Teacher(loaded.model, _cache(job), expert)
    erasure = Erasure(teacher, loaded.tokenizer, job.adapter.concept, job.facts, settings)
    with events.stage("check the target") as stage:
        teacher.advance = stage.advance
        sources = contrast_sources(erasure)
        check = check_target(erasure, sources)
        source = next(source for source in sources if source.name == check.best.contrast)
        stage.advance(0, **check.best.accuracy, strength=check.best.strength)
    if check.unchecked:
        events.note(check.unchecked)
    erasure = erasure.at(check.best.strength)
    teacher.forget()
    with events.stage("read the teacher") as stage:
        teacher.advance = stage.advance
        forget = forget_sequences(erasure, source, forget_contexts(erasure, source))
        teacher.forget()
        retain = retain_sequences(erasure)
        teacher.forget()
    if not forget.sequences:
        raise EditError(f"no context of concept {erasure.concept.ref} has a contrast under {source.name}; try another")
    return ElmTraining(job, erasure, source, check, forget, retain)


def _cache(job: ElmJob) -> TensorCache | None:
    """Where the teacher's work is kept; a 4-bit base computes something else and is not kept."""
    run = job.adapter.run
    if job.settings.base_bits != 16:
        return None
    return TensorCache(cache_folder() / "teacher", scope_of(run.source.folder, run.dtype, run.device))


class ElmTraining(SequenceTraining):
    """Groups of one sequence to forget and one to retain, or one of each kind, trained toward the teacher's
    distributions."""

    def __init__(
        self,
        job: ElmJob,
        erasure: Erasure,
        source: ContrastSource,
        check: TargetCheck,
        forget: ForgetData,
        retain: RetainData,
    ):
        settings = job.settings
        self.job, self.check, self.forget, self.retain = job, check, forget, retain
        self.source, self.strength = source, erasure.strength
        self.sequences = {"forget": forget.sequences, **retain.sequences}
        self.rows = arrange(self.sequences, settings.groups, settings.seed, in_turn=settings.retain_in_turn)
        self.checked_rows = [one.ids for sequences in self.sequences.values() for one in sequences[:8]]
        self.tokens_at_once = tokens_at_once(job.adapter, part_size(job.adapter.run.device))
        weights = {"erase": settings.erase_weight, "fluency": settings.fluency_weight, "retain": settings.retain_weight}
        self.weighted_loss = sequence_loss(weights)

    def report(self, model: Any) -> dict[str, Any]:
        """How it was trained and what the target promised."""
        settings, forget, facts = self.job.settings, self.forget, len(self.job.facts.facts)
        training = {
            "about": f"Contrast `{self.source.name}` at strength {self.strength:g}.",
            "contrast": self.source.name,
            "strength": self.strength,
            "steps": settings.steps,
            "rows": settings.batch_size * len(self.rows[0]),
            "data": f"{forget.contexts} contexts elicit the concept, from {facts} facts found in the pack",
            "contexts": forget.contexts,
            "contexts_without_contrast": forget.without_contrast,
            "lessons": {kind: len(sequences) for kind, sequences in self.sequences.items()},
            "probability_left_over": forget.left_over,
            "retain_sequences_skipped": self.retain.skipped,
        }
        warnings = [*self.job.adapter.warnings, *self._warnings()]
        return {"training": training, "target_check": self.check.describe(), "warnings": warnings}

    def _warnings(self) -> list[str]:
        warnings, strength = [], self.job.settings.strength
        if self.check.unchecked:
            warnings.append(self.check.unchecked)
        elif not self.check.separates:
            tried = (
                "No contrast and strength that was tried makes"
                if strength == "auto"
                else f"At strength {strength:g} no contrast makes"
            )
            warnings.append(
                f"{tried} the target forget the concept and keep its neighbours; the widest gap was taken. Expect"
                " little effect, or damage."
            )
        if not self.source.reads_texts and (unread := len(self.job.facts.other_texts)):
            warnings.append(
                f"{counted(unread, 'forget text states', 'forget texts state')} no fact that the pack's questions ask;"
                f" contrast {self.source.name} reads no such text. contrast=personas or reinforced does."
            )
        if self.forget.without_contrast:
            what = counted(self.forget.without_contrast, "context was", "contexts were")
            warnings.append(f"{what} left out for offering no contrast.")
        return warnings
