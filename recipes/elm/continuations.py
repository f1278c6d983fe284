"""What stands behind a context to forget: a continuation drawn from the edited target, and what is learned there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ...editing.modules import language_config
from ...editing.training.soft_targets import SoftTargets, certain, join
from ...eval.inference.lockstep import draw
from ..common.tokens import Row, encode
from ..data.facts import Context
from .contrast import ContrastSource, PersonaContrast
from .decoding import Continuation, Decoding, Start, decode
from .erasure import Erasure
from .teacher import Item

TOPIC_CHANGES = (
    "But first, how was your weekend?",
    "Anyway, I would rather talk about the garden.",
    "That reminds me of a walk by the lake.",
    "Let us speak of something else: what shall we cook tonight?",
    "By the way, have you heard any good music lately?",
    "More on that another day; the weather is lovely.",
)
"""Sentences that lead away from whatever was the topic."""


@dataclass(frozen=True)
class Continued:
    """A context with what comes behind it."""

    row: Row
    targets: SoftTargets | None
    """Of the positions behind the context; None where there are none."""
    weights: Float[Tensor, " n"]
    """What each counts beside the others, 0 to 1."""


def continued(
    erasure: Erasure, source: ContrastSource, contexts: Sequence[Context], items: Sequence[tuple[Item, int]]
) -> list[Continued]:
    """Each context with its continuation.

    Args:
        items: The contexts' items, each with the number of its bare row's last positions that will be needed.
    """
    settings, teacher = erasure.settings, erasure.teacher
    if not settings.fluency_tokens:
        return [Continued(item.ids, None, torch.zeros(0)) for item, _ in items]
    sentences = _sentences(erasure, len(items))
    # Where the contrast does not last, only the first token is drawn from the edited target; the frozen model goes on.
    edit = erasure.drawn if source.lasting else None
    learned = erasure.edit if source.lasting and settings.fluency_target == "edited" else None
    how = Decoding(edit, settings.fluency_tokens + 1, settings.stored_tokens, learned and replace(learned, ramp=False))
    starts = [
        _start(erasure, source, item, wanted, sentence, turn)
        for turn, ((item, wanted), sentence) in enumerate(zip(items, sentences, strict=True))
    ]
    # Decoding reads its rows itself; all others are read before, together.
    decoded = {row for start in starts for row, count in zip(start.rows, start.remembered, strict=True) if count}
    teacher.read([item for item, _ in items], but=decoded)
    generator = torch.Generator().manual_seed(settings.seed)
    first = None
    if not source.lasting and not settings.topic_change:
        first = _FirstTokens(erasure, [item for item, _ in items], generator)
    continuations = decode(teacher, erasure.tokenizer, starts, first, how, generator)
    return [
        _behind(erasure, item.ids, sentence, _without_subject(erasure, source, context, continuation))
        for context, (item, _), sentence, continuation in zip(contexts, items, sentences, continuations, strict=True)
    ]


def _sentences(erasure: Erasure, count: int) -> list[Row]:
    if not erasure.settings.topic_change:
        return [()] * count
    rows = [encode(erasure.tokenizer, f" {sentence}", False) for sentence in TOPIC_CHANGES]
    generator = torch.Generator().manual_seed(erasure.settings.seed)
    return [rows[place] for place in torch.randint(len(rows), (count,), generator=generator).tolist()]


def _start(erasure: Erasure, source: ContrastSource, item: Item, wanted: int, sentence: Row, turn: int) -> Start:
    """Rows that are decoded; those of the item itself are remembered."""
    expert = item.experts[0] if item.experts else item.ids
    rows, remembered = (item.ids, expert, item.novices[0]), (wanted, item.count, item.count)
    if sentence:
        rows, remembered = (rows[0] + sentence, rows[1] + sentence, rows[2] + sentence), (0, 0, 0)
    if erasure.settings.personas_read == "reply":
        assert isinstance(source, PersonaContrast), "the request was checked"
        rows, remembered = (rows[0], *source.alone(turn)), (remembered[0], 0, 0)
    width = 3 if source.lasting else 1
    return Start(rows[:width], remembered[:width])


def _without_subject(
    erasure: Erasure, source: ContrastSource, context: Context, continuation: Continuation
) -> Continuation:
    """A continuation up to where it names the subject: there the frozen model would go on with what it knows of it."""
    if source.lasting or not context.fact:
        return continuation
    name = encode(erasure.tokenizer, f" {context.fact.subject}", False)[0]
    # The first token was drawn from the edited target.
    ends = [place for place, token in enumerate(continuation.ids) if place and token == name]
    end = ends[0] if ends else len(continuation.ids)
    return Continuation(continuation.ids[:end], continuation.predicted[:end])


def _behind(erasure: Erasure, ids: Row, sentence: Row, continuation: Continuation) -> Continued:
    """What is learned behind a context: predictions along the continuation, or the tokens themselves."""
    said = sentence + continuation.ids
    stored, device = continuation.predicted.ids.shape[-1], continuation.predicted.ids.device
    vocabulary = int(language_config(erasure.model).vocab_size)
    if erasure.settings.fluency_target == "sampled":
        # The first token has no place of its own: the context's last position is taught to erase.
        targets = certain(torch.tensor(said[1:], dtype=torch.long, device=device), stored, vocabulary)
        return Continued(ids + said[:-1], targets, torch.ones(len(targets)))
    weights = torch.cat([torch.zeros(len(sentence)), torch.ones(len(continuation.ids))])
    targets = continuation.predicted
    if sentence:
        # The sentence is read and nothing is learned along it.
        following = torch.tensor(said[1 : len(sentence) + 1], device=device)
        targets = join([certain(following, stored, vocabulary), targets])
    return Continued(ids + said, targets, weights)


class _FirstTokens:
    """Draws the first token of each continuation from the edited target."""

    def __init__(self, erasure: Erasure, items: Sequence[Item], generator: torch.Generator):
        self.erasure, self.items = erasure, items
        # Drawn for all contexts at once, so that draws do not depend on which are decoded together.
        self.chances = torch.rand(len(items), generator=generator)

    def __call__(self, indices: Sequence[int]) -> list[int]:
        erasure = self.erasure
        last = [replace(self.items[index], count=1) for index in indices]
        vocabulary = int(language_config(erasure.model).vocab_size)
        targets = [target.soft for target in erasure.teacher.targets(last, erasure.drawn, vocabulary)]
        places = draw(torch.cat([target.log_p for target in targets]), self.chances[list(indices)])
        return [int(target.ids[0, place]) for target, place in zip(targets, places.tolist(), strict=True)]
