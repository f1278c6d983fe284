"""What ELM trains to forget: contexts that elicit the concept, with edited targets and fluent continuations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...editing.training.soft_targets import SoftTargets, Streams, join
from ..common.examples import spread
from ..common.tokens import Row, encode
from ..data.facts import Context, Facts, chat_contexts, fact_contexts, text_contexts
from .batches import TERMS, TrainingSequence
from .contrast import ContrastSource, contrasted
from .decoding import Decoding, decode, decoded_rows
from .erasure import Erasure
from .replies import varied_replies
from .teacher import Item

FLOOR = 0.02
"""Weight of a position where expert and novice agree, beside their disagreement (0 to 1)."""


OUTSIDE = 0.2
"""Weight of all positions of a forget context that carry no contrast, together."""


@dataclass(frozen=True)
class ForgetData:
    """Sequences that erase, and what was left out."""

    sequences: list[TrainingSequence]
    contexts: int
    without_contrast: int
    """Contexts that were left out."""
    left_over: float
    """Mean probability outside the stored tokens: the truncation of the targets."""


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
        texts = text_contexts(concept, tokenizer, erasure.text_limit)
        return spread(texts, settings.max_contexts, f"excise texts {seed}")
    contexts: list[Context] = []
    if settings.contexts in ("texts", "both"):
        contexts += fact_contexts(facts, "texts", seed)
    if settings.contexts in ("questions", "both"):
        contexts += fact_contexts(facts, "questions", seed)
    contexts = spread(list(dict.fromkeys(contexts)), settings.max_contexts, f"excise contexts {seed}")
    if settings.contexts in ("questions", "both") and tokenizer.chat_template:
        in_chat = spread(facts.facts, settings.chat_facts, f"excise chat {seed}")
        contexts += chat_contexts(in_chat, lambda prompts: varied_replies(erasure, prompts), tokenizer)
    return list(dict.fromkeys(contexts))


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
    continued = _continued(erasure, source, elicited)
    # What comes before the contrast is retained. It is read first, as it covers what the streams need of the bare
    # contexts.
    before = _before_contrast(erasure, elicited)
    streams = teacher.streams([one.item for one in elicited], settings.stored_tokens, settings.temperature)
    targets = [edited_target(erasure, stream, ramp=settings.strength_ramp) for stream in streams]
    weights = _position_weights(erasure, elicited, streams)
    sequences = []
    for index, (row, continuation) in enumerate(continued):
        nothing = targets[index][:0]
        after = nothing if continuation is None else continuation
        # The contrast may begin before the first position that counts.
        target = targets[index][-len(weights[index]) :]
        sequences.append(_sequence(row, before.get(index, nothing), target, after, weights[index]))
    left_over = float(torch.cat([stream.left_over() for stream in streams]).mean())
    return ForgetData(sequences, len(contexts), len(contexts) - len(elicited), left_over)


def edited_target(erasure: Erasure, stream: Streams, *, ramp: bool) -> SoftTargets:
    """The edited distribution; with a ramp its strength grows from 1 along the positions (the 2025-03 code)."""
    settings = erasure.settings
    strength: float | Tensor = erasure.strength
    if ramp:
        strength = torch.linspace(1.0, erasure.strength, len(stream.ids), device=stream.ids.device)
    target = stream.target(strength, one_sided=settings.one_sided)
    return target.largest(settings.target_top_k) if settings.target_top_k else target


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


def _position_weights(erasure: Erasure, elicited: Sequence[_Elicited], streams: Sequence[Streams]) -> list[Tensor]:
    """Weights of the positions that carry the contrast, for each context."""
    counts = [len(one.item.ids) - one.begin for one in elicited]
    if erasure.settings.weighting == "uniform":
        return [torch.full((count,), 1 / count) for count in counts]
    # Divided by the mean over contexts, so that the weights of a context sum to about 1, as uniform ones do.
    mean = torch.stack([stream.disagreement().sum() for stream in streams]).mean().clamp_min(1e-6)
    return [((stream.disagreement() + FLOOR) / mean)[-count:] for stream, count in zip(streams, counts, strict=True)]


def _sequence(
    row: Row, before: SoftTargets, target: SoftTargets, after: SoftTargets, weights: Tensor
) -> TrainingSequence:
    """A sequence whose target is an edited one in the middle, with these weights, and the frozen model's own around
    it."""
    whole, begin = join([before, target, after]), len(before)
    all_weights = torch.full((len(whole),), OUTSIDE / len(whole))
    all_weights[begin : begin + len(target)] = weights
    terms = torch.full((len(whole),), TERMS.index("fluency"))
    terms[begin : begin + len(target)] = TERMS.index("erase")
    return TrainingSequence(row, whole, all_weights, terms)


def _continued(
    erasure: Erasure, source: ContrastSource, elicited: Sequence[_Elicited]
) -> list[tuple[Row, SoftTargets | None]]:
    """Each context with what the edited target would say next, and what the frozen model predicts from there on."""
    settings, teacher = erasure.settings, erasure.teacher
    items = [one.item for one in elicited]
    if not settings.fluency_tokens:
        return [(item.ids, None) for item in items]
    # Where the contrast does not last, only the first token is drawn from the edited target; the frozen model goes on.
    how = Decoding(erasure.strength if source.lasting else 0.0, settings.fluency_tokens + 1, settings.stored_tokens)
    # Decoding reads its rows itself; all others are read before, together.
    teacher.read(items, but={row for item in items for row in decoded_rows(item, how.strength)})
    generator = torch.Generator().manual_seed(settings.seed)
    # It draws its noise here, before ``decode`` draws from the same generator: another order gives other continuations.
    first_tokens = _FirstTokens(erasure, items, generator)
    remembered = [(one.item, max(one.item.count, len(one.item.ids) - one.first)) for one in elicited]
    continuations = decode(teacher, erasure.tokenizer, remembered, first_tokens, how, generator)
    rows: list[tuple[Row, SoftTargets | None]] = []
    for one, continuation in zip(elicited, continuations, strict=True):
        token, more = continuation.ids[0], continuation.ids[1:]
        if not source.lasting and one.context.fact:
            # Where the subject is named again, the frozen model would go on with what it knows of it.
            more = _until(more, encode(erasure.tokenizer, f" {one.context.fact.subject}", False)[0])
        rows.append(((*one.item.ids, token, *more), continuation.bare[: len(more) + 1]))
    return rows


class _FirstTokens:
    """Draws the first token of each continuation from the edited target."""

    def __init__(self, erasure: Erasure, items: Sequence[Item], generator: torch.Generator):
        self.erasure, self.items = erasure, items
        stored = min(erasure.settings.stored_tokens, int(erasure.model.config.vocab_size))
        self.noise = [torch.empty(stored).exponential_(generator=generator) for _ in items]

    def __call__(self, indices: Sequence[int]) -> list[int]:
        settings = self.erasure.settings
        last = [replace(self.items[index], count=1) for index in indices]
        tokens = []
        streams = self.erasure.teacher.streams(last, settings.stored_tokens, settings.temperature)
        for index, stream in zip(indices, streams, strict=True):
            target = edited_target(self.erasure, stream, ramp=False)
            # The largest quotient of probability and exponential noise is a draw.
            place = int((target.log_p[-1].exp() / self.noise[index].to(target.log_p)).argmax())
            tokens.append(int(target.ids[-1, place]))
        return tokens


def _until(ids: Row, token: int) -> Row:
    return ids[: ids.index(token)] if token in ids else ids
