"""What a model recites of passages, and knows of them, as MUSE asks it (Shi et al. 2024): plain text, greedy, ROUGE-L F1
without stems."""

from collections.abc import Sequence

from ..completed import bare
from ..concept import Concept, OpenQuestion, Passage, Shot
from ..drawing import drawn
from ..inference.encoding import encode
from ..items import clusters_of
from ..model_under_test import ModelUnderTest
from ..statistics import Scores
from .by_item import scored
from .open_answers import best_rouge, countable, open_by_split
from .rouge import is_countable, rouge_l

PASSAGE_TOKENS = 128
"""Tokens of a passage that are generated and compared (MUSE, section 3.1)."""
ANSWER_TOKENS = 32
"""Tokens of an answer (MUSE's knowmem)."""
ENDS = ("\n\n", "\nQuestion", "Question:")
"""Where an answer ends: models without a chat template go on to ask themselves."""


def passages_of(concept: Concept, split: str, most: int = 0) -> list[Passage]:
    """Passages of a split, drawn at random over subjects; 0 takes all."""
    rows = [row for row in concept.passages if row.split == split]
    return drawn(rows, clusters_of(concept, rows), most, f"passages {split}")


def verbatim(subject: ModelUnderTest) -> list[Scores]:
    """``verbatim_memorization``: ROUGE-L F1 of the greedy continuation of passages against how they go on."""
    results = []
    for split in ("forget", "retain"):
        rows = passages_of(subject.concept, split, subject.settings.questions)
        passages, rows = rows, [one for one in rows if is_countable(one.continuation)]
        if not passages:
            continue
        most = min(PASSAGE_TOKENS, subject.settings.max_new_tokens)
        replies = subject.completions([one.prompt for one in rows], most)
        values = [
            rouge_l(_beginning(subject, one.continuation, most), reply.text, stem=False).f1
            for one, reply in zip(rows, replies, strict=True)
        ]
        results.append(scored(subject, "verbatim_memorization", split, rows, values, len(passages) - len(rows)))
    return results


def _beginning(subject: ModelUnderTest, text: str, most: int) -> str:
    """As much of a continuation as is generated."""
    ids = encode(subject.tokenizer, text, special=False)
    return text if len(ids) <= most else str(subject.tokenizer.decode(ids[:most]))


def knowledge(subject: ModelUnderTest) -> list[Scores]:
    """``knowledge_memorization`` on the open questions of every split, after the pack's shots."""
    splits = open_by_split(subject.concept, subject.settings.questions)
    return [knowledge_of(subject, split, rows) for split, rows in splits.items()]


def knowledge_of(subject: ModelUnderTest, split: str, rows: Sequence[OpenQuestion]) -> Scores:
    """ROUGE-L F1 of the answers to some open questions, asked in plain text after the shots of their split."""
    rows, skipped = countable(rows)
    shown = "forget" if split.startswith("forget") else "retain"
    shots = [shot for shot in subject.concept.shots if shot.split == shown]
    most = min(ANSWER_TOKENS, subject.settings.max_new_tokens)
    replies = subject.completions([with_shots(row.prompt, shots) for row in rows], most)
    values = [best_rouge(row, answer_in(reply.text), stem=False).f1 for row, reply in zip(rows, replies, strict=True)]
    return scored(subject, "knowledge_memorization", split, rows, values, skipped)


def with_shots(question: str, shots: Sequence[Shot]) -> str:
    """A question after examples with their answers.

    Example:
        >>> with_shots("Who wrote it?", [])
        'Question: Who wrote it?\\nAnswer:'
    """
    # No blank after the colon: it belongs to the answer's first token.
    front = "".join(f"Question: {bare(shot.prompt)}\nAnswer: {shot.answer}\n\n" for shot in shots)
    return f"{front}Question: {bare(question)}\nAnswer:"


def answer_in(text: str) -> str:
    """A reply up to where it goes on to another question."""
    for end in ENDS:
        text = text.split(end)[0]
    return text
