"""What ELM trains to retain: the frozen model's own predictions on everything that must stay."""

from dataclasses import dataclass

import torch

from ...editing.training.soft_targets import SoftTargets
from ..common.examples import spread
from ..common.tokens import Row, encode, pieces
from ..data.facts import bare_question, question_contexts
from ..data.unlearning_sets import without_subjects
from .batches import TERMS, TrainingSequence
from .erasure import Erasure
from .replies import CHAT_PROMPTS, varied_replies


@dataclass(frozen=True)
class RetainData:
    """Sequences by kind: texts, questions, chats; and what was left out."""

    sequences: dict[str, list[TrainingSequence]]
    skipped: int
    """Sequences that name a subject to forget."""


def retain_sequences(erasure: Erasure) -> RetainData:
    """Sequences that retain the frozen model's distribution; chats that name a subject to forget are left out."""
    kinds, settings = _rows_by_kind(erasure), erasure.settings
    clean, skipped = {}, 0
    for kind, rows in kinds.items():
        whole = [row for row in dict.fromkeys(rows) if len(row) > 1]
        unnamed = without_subjects(whole, erasure.facts, erasure.tokenizer) if kind == "chats" else whole
        skipped += len(whole) - len(unnamed)
        clean[kind] = unnamed
    clean = {kind: rows for kind, rows in clean.items() if rows}
    # The term is the mean over the kinds that there are, in a group or from group to group.
    beside = 1 if settings.retain_in_turn else len(clean)
    sequences = {}
    for kind, whole in clean.items():
        # Sequences that no step will read need no targets.
        read = -(-settings.groups * beside // len(clean))
        rows = spread(whole, read, f"excise groups {kind} {settings.seed}")
        targets = erasure.teacher.top(rows, [0] * len(rows), settings.stored_tokens)
        sequences[kind] = [
            retain_sequence(erasure, row, target, beside) for row, target in zip(rows, targets, strict=True)
        ]
    return RetainData(sequences, skipped)


def _rows_by_kind(erasure: Erasure) -> dict[str, list[Row]]:
    """Retain texts, group-T questions on other things, and the frozen model's replies in chat."""
    settings, concept, tokenizer = erasure.settings, erasure.concept, erasure.tokenizer
    questions = [q for q in concept.questions if q.split != "forget" and q.group == "T"]
    most = settings.contexts_read
    texts = spread(concept.retain, most, f"excise {settings.seed}")
    whole = [encode(tokenizer, text.text, True) for text in texts]
    kinds = {"texts": [piece for row in whole for piece in pieces(row, erasure.text_limit)]}
    if settings.contexts == "texts":
        return kinds
    contexts = spread(list(question_contexts(questions, settings.seed)), most, f"excise retain {settings.seed}")
    kinds["questions"] = [encode(tokenizer, context.text, True) for context in contexts]
    if tokenizer.chat_template:
        in_chat = spread(questions, settings.chat_facts_read, f"excise chat {settings.seed}")
        prompts = [bare_question(question.prompt) for question in in_chat]
        plain = spread(CHAT_PROMPTS, most, f"excise plain {settings.seed}")
        replies = [*varied_replies(erasure, prompts), *varied_replies(erasure, plain)]
        kinds["chats"] = [reply.prompt_ids + reply.ids for reply in replies]
    return kinds


def retain_sequence(erasure: Erasure, row: Row, target: SoftTargets, kinds: int) -> TrainingSequence:
    """A sequence to retain; those of so many kinds are in a group, so that the term is their mean."""
    n = len(row)
    weights, terms = torch.full((n,), 1 / (n * kinds)), torch.full((n,), TERMS.index("retain"))
    return TrainingSequence(row, target.largest(1) if erasure.settings.hard_retain else target, weights, terms)
