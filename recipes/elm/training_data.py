"""What ELM trains on: forget contexts with their targets and continuations, and everything that must stay."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...editing.training.soft_targets import SoftTargets, Streams, join
from ...eval.concept import Concept
from ...eval.inference.generation import Reply, generate
from ..common.examples import spread
from ..common.tokens import Row, encode, pieces
from ..data.facts import Context, Facts, bare_question, chat_contexts, fact_contexts, question_contexts, text_contexts
from ..data.unlearning_sets import RETAIN_TEXTS
from .batches import TERMS, TrainingSequence
from .contrast import ContrastSource, contrasted
from .decoding import decode, decoded_rows
from .plain_chat import CHAT_PROMPTS
from .teacher import Item, Teacher

CHAT_SAMPLES = 2
"""Sampled replies to each, beside the greedy one: an answer comes in more than one form."""


FLOOR = 0.02
"""Weight of a position where expert and novice agree, beside their disagreement (0 to 1)."""


OUTSIDE = 0.2
"""Weight of all positions of a forget context that carry no contrast, together."""


@dataclass(frozen=True)
class Recipe:
    """How targets are formed; the settings' own fields."""

    strength: float
    one_sided: bool
    ramp: bool
    temperature: float
    top_k: int
    kept: int
    contexts: Literal["texts", "questions", "both"]
    weighting: Literal["disagreement", "uniform"]
    hard_retain: bool
    fluency_tokens: int
    chat_facts: int
    """Facts, and as many questions to retain, that are asked in the chat template."""
    most: int
    """Contexts to forget, and retain sequences of each kind, at most."""
    seed: int


@dataclass(frozen=True)
class TrainingData:
    """Lessons by kind, and what was left out."""

    lessons: dict[str, list[TrainingSequence]]
    contexts: int
    without_contrast: int
    left_over: float
    """Mean probability outside the kept tokens: the truncation of the targets."""
    skipped_retain: int
    """Retain sequences that name a subject to forget."""

    def describe(self) -> dict[str, Any]:
        return {
            "contexts": self.contexts, "contexts_without_contrast": self.without_contrast,
            "lessons": {kind: len(items) for kind, items in self.lessons.items()},
            "probability_left_over": self.left_over, "retain_sequences_skipped": self.skipped_retain,
        }  # fmt: skip


def forget_contexts(
    concept: Concept, facts: Facts, tokenizer: Any, reply: "Replies", recipe: Recipe, limit: int
) -> list[Context]:
    """Contexts in which the model says what is to be forgotten."""
    seed = recipe.seed
    if not facts.facts:
        return spread(text_contexts(concept, tokenizer, limit), recipe.most, f"excise texts {seed}")
    found = []
    if recipe.contexts in ("texts", "both"):
        found += list(fact_contexts(facts, "texts", seed))
    if recipe.contexts in ("questions", "both"):
        found += list(fact_contexts(facts, "questions", seed))
    found = spread(list(dict.fromkeys(found)), recipe.most, f"excise contexts {seed}")
    if recipe.contexts in ("questions", "both") and tokenizer.chat_template:
        chatted = spread(facts.facts, recipe.chat_facts, f"excise chat {seed}")
        found += chat_contexts(chatted, reply.varied, tokenizer)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Replies:
    """The frozen model's own replies through its chat template."""

    model: Any
    tokenizer: Any
    tokens: int
    seed: int

    def greedy(self, prompts: Sequence[str]) -> list[Reply]:
        return generate(self.model, self.tokenizer, prompts, self.tokens)

    def varied(self, prompts: Sequence[str]) -> list[Reply]:
        """The greedy reply to each prompt, then sampled ones; a reply's prompt says what it answers."""
        sampled = [
            reply
            for turn in range(CHAT_SAMPLES)
            for reply in generate(self.model, self.tokenizer, prompts, self.tokens, sample_seed=self.seed + turn)
        ]
        return [*self.greedy(prompts), *sampled]


def forget_sequences(
    teacher: Teacher, tokenizer: Any, contexts: Sequence[Context], source: ContrastSource, recipe: Recipe
) -> tuple[list[TrainingSequence], int, float]:
    """Lessons that erase, each with a continuation sampled from the edited target, on which fluency is taught.

    Returns:
        The lessons, how many contexts had no contrast, and the mean probability outside the kept tokens.
    """
    items = contrasted(contexts, source, tokenizer)
    pairs = [(context, item) for context, item in zip(contexts, items, strict=True) if item]
    if not pairs:
        return [], len(contexts), 0.0
    firsts = [_reply_start(tokenizer, context) for context, _ in pairs]
    begins = [max(first, len(item.ids) - item.count) for (_, item), first in zip(pairs, firsts, strict=True)]
    early = [index for index, begin in enumerate(begins) if begin > firsts[index]]
    wanted = [max(item.count, len(item.ids) - first) for (_, item), first in zip(pairs, firsts, strict=True)]
    continued = _continued(teacher, tokenizer, pairs, wanted, source, recipe)
    # What comes before the contrast is kept. It is read first, as it covers what the streams need of the bare contexts.
    own = teacher.top([pairs[index][1].ids for index in early], [firsts[index] for index in early], recipe.kept)
    before = dict(zip(early, own, strict=True))
    streams = teacher.streams([item for _, item in pairs], recipe.kept, recipe.temperature)
    targets = [form_target(stream, recipe) for stream in streams]
    mean = torch.stack([stream.disagreement().sum() for stream in streams]).mean().clamp_min(1e-6)
    lessons = []
    for index, (row, said) in enumerate(continued):
        after = said or targets[index][:0]
        used = len(pairs[index][1].ids) - begins[index]
        weights = torch.full((used,), 1 / used)
        if recipe.weighting == "disagreement":
            weights = ((streams[index].disagreement() + FLOOR) / mean)[-used:]
        kept = before.get(index, after)[: begins[index] - firsts[index]]
        lessons.append(_erase(row, kept, targets[index][-used:], after, weights))
    left_over = float(torch.cat([stream.left_over() for stream in streams]).mean())
    return lessons, len(contexts) - len(pairs), left_over


def _erase(row: Row, before: SoftTargets, target: SoftTargets, after: SoftTargets, weights: Tensor) -> TrainingSequence:
    """A lesson whose target is an edited one in the middle, with these weights, and the frozen model's own around it."""
    whole, begin = join([before, target, after]), len(before)
    all_weights = torch.full((len(whole),), OUTSIDE / len(whole))
    all_weights[begin : begin + len(target)] = weights
    terms = torch.full((len(whole),), TERMS.index("fluency"))
    terms[begin : begin + len(target)] = TERMS.index("erase")
    return TrainingSequence(row, whole, all_weights, terms)


def form_target(stream: Streams, recipe: Recipe) -> SoftTargets:
    """The edited distribution; with a ramp its strength grows from 1 along the positions (the 2025-03 code)."""
    strength: float | Tensor = recipe.strength
    if recipe.ramp:
        strength = torch.linspace(1.0, recipe.strength, len(stream.ids))
    target = stream.target(strength, one_sided=recipe.one_sided)
    return target.largest(recipe.top_k) if recipe.top_k else target


def retain_sequences(
    teacher: Teacher, tokenizer: Any, concept: Concept, facts: Facts, reply: Replies, recipe: Recipe, limit: int
) -> tuple[dict[str, list[TrainingSequence]], int]:
    """Lessons that keep the frozen model's distribution: retain texts, group-T questions on other things, chat.

    Returns:
        Lessons by kind, and how many sequences were left out because they name a subject to forget.
    """
    questions = [q for q in concept.questions if q.split != "forget" and q.group == "T"]
    texts = [
        encode(tokenizer, text.text, True) for text in spread(concept.retain, RETAIN_TEXTS, f"excise {recipe.seed}")
    ]
    kinds = {"texts": [piece for ids in texts for piece in pieces(ids, limit)]}
    if recipe.contexts != "texts":
        kinds["questions"] = [
            encode(tokenizer, context.text, True) for context in question_contexts(questions, recipe.seed)
        ]
    if tokenizer.chat_template and recipe.contexts != "texts":
        prompts = [bare_question(q.prompt) for q in spread(questions, recipe.chat_facts, f"excise chat {recipe.seed}")]
        replies = [*reply.varied(prompts), *reply.varied(CHAT_PROMPTS)]
        kinds["chats"] = [said.prompt_ids + said.ids for said in replies]
    named = [
        encode(tokenizer, text, False) for fact in facts.facts for text in (f" {fact.subject}", fact.subject)
    ]  # fmt: skip
    found, skipped = {}, 0
    for kind, rows in kinds.items():
        whole = [row for row in dict.fromkeys(rows) if len(row) > 1]
        clean = whole if kind != "chats" else [row for row in whole if not any(_holds(row, name) for name in named)]
        skipped += len(whole) - len(clean)
        if clean:
            own = teacher.top(clean, [0] * len(clean), recipe.kept)
            found[kind] = [keep(row, targets, recipe, len(kinds)) for row, targets in zip(clean, own, strict=True)]
    return found, skipped


def keep(row: Row, own: SoftTargets, recipe: Recipe, kinds: int) -> TrainingSequence:
    """A sequence to keep; one of each kind is in a group, so that the term is their mean."""
    n = len(row)
    weights = torch.full((n,), 1 / (n * kinds))
    return TrainingSequence(
        row, own.largest(1) if recipe.hard_retain else own, weights, torch.full((n,), TERMS.index("retain"))
    )


def _continued(
    teacher: Teacher, tokenizer: Any, pairs: Sequence[tuple[Context, Item]], wanted: Sequence[int],
    source: ContrastSource, recipe: Recipe,
) -> list[tuple[Row, SoftTargets | None]]:  # fmt: skip
    """Each context with what the edited target would say next, and what the frozen model predicts from there on.

    Args:
        wanted: Positions of each bare context that the teacher is to remember.
    """
    items = [item for _, item in pairs]
    if not recipe.fluency_tokens:
        return [(item.ids, None) for item in items]
    strength = recipe.strength if source.lasting else 0.0
    # Decoding reads its rows itself; all others are read before, together.
    teacher.read(items, but={row for item in items for row in decoded_rows(item, strength)})
    generator = torch.Generator().manual_seed(recipe.seed)
    kept = min(recipe.kept, int(teacher.model.config.vocab_size))
    noise = [torch.empty(kept).exponential_(generator=generator) for _ in items]

    def first(some: Sequence[int]) -> list[int]:
        last = [replace(items[index], count=1) for index in some]
        streams = teacher.streams(last, recipe.kept, recipe.temperature)
        targets = [form_target(stream, replace(recipe, ramp=False)) for stream in streams]
        # The largest quotient of probability and exponential noise is a draw.
        places = [int((t.log_p[-1].exp() / noise[i].to(t.log_p)).argmax()) for i, t in zip(some, targets, strict=True)]
        return [int(target.ids[-1, place]) for target, place in zip(targets, places, strict=True)]

    found = decode(
        teacher, tokenizer, list(zip(items, wanted, strict=True)), first, strength, recipe.fluency_tokens + 1, recipe.kept, generator,
    )  # fmt: skip
    rows = list[tuple[Row, SoftTargets | None]]()
    for (context, item), said in zip(pairs, found, strict=True):
        token, more = said.ids[0], said.ids[1:]
        if not source.lasting and context.fact:
            # Where the subject is named again, the frozen model would go on with what it knows of it.
            more = _until(more, encode(tokenizer, f" {context.fact.subject}", False)[0])
        rows.append(((*item.ids, token, *more), said.own[: len(more) + 1]))
    return rows


def _until(ids: Row, token: int) -> Row:
    return ids[: ids.index(token)] if token in ids else ids


def _reply_start(tokenizer: Any, context: Context) -> int:
    """First position whose prediction counts: a plain text's first, or where the reply to a chat prompt begins."""
    return 0 if context.special else len(encode(tokenizer, context.text[: context.reply], False)) - 1


def _holds(row: Row, part: Row) -> bool:
    return any(row[start : start + len(part)] == part for start in range(len(row) - len(part) + 1))
