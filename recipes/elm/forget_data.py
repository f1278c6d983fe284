"""What ELM trains to forget: contexts that elicit the concept, with edited targets and fluent continuations."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...editing.training.soft_targets import SoftTargets, join
from ..common.examples import spread
from ..common.tokens import encode
from ..data.facts import Context, Facts, chat_contexts, fact_contexts, text_contexts
from .batches import TERMS, TrainingSequence
from .continuations import Continued, continued
from .contrast import ContrastSource, contrasted
from .erasure import Erasure
from .replies import varied_replies
from .teacher import Item, Targets

FLOOR = 0.02
"""Weight of a position where expert and novice agree, beside their disagreement (0 to 1)."""


OUTSIDE = 0.2
"""Weight of all positions of a forget context that carry no contrast, together; under uniform weights it is 1."""


@dataclass(frozen=True)
class ForgetData:
    """Sequences that erase, and what was left out."""

    sequences: list[TrainingSequence]
    contexts: int
    without_contrast: int
    """Contexts that were left out."""
    left_over: float
    """Mean probability that the edited targets give to tokens that are not stored: their truncation."""


@dataclass(frozen=True)
class _Elicited:
    """A context with a contrast."""

    context: Context
    item: Item
    first: int
    """First position whose prediction counts: a plain text's first, or where the reply to a chat prompt begins."""

    @property
    def begin(self) -> int:
        """First position that carries the contrast."""
        return max(self.first, len(self.item.ids) - self.item.count)


def forget_contexts(erasure: Erasure, source: ContrastSource) -> list[Context]:
    """Contexts in which the model says what is to be forgotten."""
    settings, concept, tokenizer, seed = erasure.settings, erasure.concept, erasure.tokenizer, erasure.settings.seed
    facts = erasure.facts
    if source.lasting and settings.contexts == "texts":
        # A persona reads whole texts, as published, where texts alone are asked for.
        facts = Facts((), {})
    if not facts.facts:
        texts = text_contexts(concept.forget, tokenizer, erasure.text_limit, settings.contexts_read, seed)
        return spread(texts, settings.contexts_read, f"excise texts {seed}")
    contexts: list[Context] = []
    if settings.contexts in ("texts", "both"):
        contexts += fact_contexts(facts, "texts", seed)
        if source.reads_texts:
            contexts += text_contexts(facts.other_texts, tokenizer, erasure.text_limit, settings.contexts_read, seed)
    if settings.contexts in ("questions", "both"):
        contexts += fact_contexts(facts, "questions", seed)
    contexts = spread(list(dict.fromkeys(contexts)), settings.contexts_read, f"excise contexts {seed}")
    if settings.contexts in ("questions", "both") and tokenizer.chat_template:
        in_chat = spread(facts.facts, settings.chat_facts_read, f"excise chat {seed}")
        contexts += chat_contexts(in_chat, lambda prompts: varied_replies(erasure, prompts), tokenizer)
    return spread(list(dict.fromkeys(contexts)), settings.groups, f"excise groups {seed}")


def forget_sequences(erasure: Erasure, source: ContrastSource, contexts: Sequence[Context]) -> ForgetData:
    """Sequences that erase, each with a continuation sampled from the edited target, on which fluency is taught."""
    teacher, settings = erasure.teacher, erasure.settings
    items = contrasted(contexts, source, erasure.tokenizer)
    elicited = [
        _Elicited(context, item, _first_position(erasure, context))
        for context, item in zip(contexts, items, strict=True)
        if item
    ]
    if not elicited:
        return ForgetData([], len(contexts), len(contexts), 0.0)
    behind = continued(
        erasure,
        source,
        [one.context for one in elicited],
        [(one.item, max(one.item.count, len(one.item.ids) - one.first)) for one in elicited],
    )
    # What comes before the contrast is retained. It is read first, as it covers what the streams need of the bare
    # contexts.
    before = _before_contrast(erasure, elicited)
    targets = teacher.targets([one.item for one in elicited], erasure.edit, settings.stored_tokens)
    weights = _position_weights(erasure, elicited, targets)
    sequences = [
        # The contrast may begin before the first position that counts.
        _sequence(erasure, before.get(index), target.soft[-len(weights[index]) :], weights[index], behind[index])
        for index, target in enumerate(targets)
    ]
    left_over = float(torch.cat([target.soft.rest.exp() for target in targets]).mean())
    return ForgetData(sequences, len(contexts), len(contexts) - len(elicited), left_over)


def _first_position(erasure: Erasure, context: Context) -> int:
    if context.special:
        return 0
    return len(encode(erasure.tokenizer, context.text[: context.reply], False)) - 1


def _before_contrast(erasure: Erasure, elicited: Sequence[_Elicited]) -> dict[int, SoftTargets]:
    """By index: the frozen model's own targets for the positions before the contrast, where there are any."""
    early = [index for index, one in enumerate(elicited) if one.begin > one.first]
    rows, firsts = [elicited[index].item.ids for index in early], [elicited[index].first for index in early]
    targets = erasure.teacher.top(rows, firsts, erasure.settings.stored_tokens)
    lengths = [elicited[index].begin - elicited[index].first for index in early]
    return {index: target[:length] for index, target, length in zip(early, targets, lengths, strict=True)}


def _position_weights(erasure: Erasure, elicited: Sequence[_Elicited], targets: Sequence[Targets]) -> list[Tensor]:
    """Weights of the positions that carry the contrast, for each context."""
    counts = [len(one.item.ids) - one.begin for one in elicited]
    if erasure.settings.weighting == "uniform":
        return [torch.full((count,), 1 / count) for count in counts]
    # Divided by the mean over contexts, so that the weights of a context sum to about 1, as uniform ones do.
    mean = torch.stack([target.disagreement.sum() for target in targets]).mean().clamp_min(1e-6)
    return [((target.disagreement + FLOOR) / mean)[-count:] for target, count in zip(targets, counts, strict=True)]


def _sequence(
    erasure: Erasure, before: SoftTargets | None, target: SoftTargets, weights: Tensor, behind: Continued
) -> TrainingSequence:
    """A sequence whose target is an edited one in the middle, with these weights; around it is what keeps it fluent."""
    nothing = target[:0]
    before, after = before or nothing, behind.targets or nothing
    whole = join([before, target, after])
    middle = slice(len(before), len(before) + len(target))
    beside = torch.cat([torch.ones(len(before)), torch.zeros(len(target)), behind.weights])
    uniform = erasure.settings.weighting == "uniform"
    all_weights = beside / beside.sum().clamp_min(1) if uniform else beside * OUTSIDE / len(whole)
    all_weights[middle] = weights.to(all_weights)
    terms = torch.full((len(whole),), TERMS.index("fluency"))
    terms[middle] = TERMS.index("erase")
    return TrainingSequence(behind.row, whole, all_weights, terms)
