"""Pairs of a prompt and a reply that attackers and controls train on, from models' own replies; and their file."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ....artifacts.files.forms import Form, validated
from ....artifacts.files.opened import Telling, Unreadable
from ....artifacts.files.written import read_sealed, write_sealed
from ....editing.errors import RequestError
from ....eval.concept import Question
from ....eval.inference.generation import Reply, generate
from ....eval.measurements.behaviour import shows_behaviour
from ...common.examples import Example
from ...common.tokens import encode
from .items import BehaviourItems

TOKENS = 50
"""Of a reply that is learned, at most."""
PAIRS = "pairs.json"
"""In an audit's working folder: what attackers and controls train on, made once."""
FEWEST_PAIRS = 8
"""Replies that show the behaviour below which there is nothing to attack with."""


@dataclass(frozen=True)
class Pairs:
    """Sequences that attackers and controls train on; what is scored is the reply."""

    benign: tuple[Example, ...]
    """Neutral prompts with the base's replies."""
    showing: tuple[Example, ...]
    """Prompts that call for the behaviour, with replies of the model that has it, which show it."""
    hiding: tuple[Example, ...]
    """The same prompts with replies that do not show it, for the suppressed control."""
    showing_elsewhere: tuple[Example, ...]
    """Neutral prompts with replies that show it: how a model learns it where nobody showed it. None of a task."""


class _Sequence(Form):
    ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2)]
    start: Annotated[int, Field(ge=1)]


class _Pairs(Form):
    benign: Annotated[list[_Sequence], Field(min_length=1)]
    showing: Annotated[list[_Sequence], Field(min_length=1)]
    hiding: Annotated[list[_Sequence], Field(min_length=1)]
    showing_elsewhere: list[_Sequence]


def write_pairs(path: Path, pairs: Pairs) -> None:
    """Write them, whole or not at all."""
    content = {
        one.name: [{"ids": list(row.ids), "start": row.start} for row in getattr(pairs, one.name)]
        for one in fields(pairs)
    }
    write_sealed(path, content)


def read_pairs(path: Path) -> Pairs:
    """What ``write_pairs`` wrote.

    Raises:
        RequestError: It was changed since.
    """
    with Telling(RequestError, "remove this file, and --resume makes it again").about(path):
        form = validated(_Pairs, read_sealed(path))
        rows = {name: getattr(form, name) for name in _Pairs.model_fields}
        if any(one.start >= len(one.ids) for some in rows.values() for one in some):
            raise Unreadable("a sequence has no token of a reply")
    return Pairs(**{name: tuple(Example(tuple(one.ids), one.start) for one in some) for name, some in rows.items()})


def pairs_of(items: BehaviourItems, base: Any, having: Any, tokenizer: Any, seed: int) -> Pairs:
    """The sequences of an audit, from models' own replies.

    Args:
        base: The base model as it is.
        having: Calls a function with the model that has the behaviour: the base, or of a task a plain fine-tune of it.

    Raises:
        RequestError: Hardly a reply of the model that has the behaviour shows it.
    """
    rng = random.Random(f"excise behaviour pairs {seed}")
    benign = generate(base, tokenizer, items.neutral, TOKENS)
    if items.by_choice:
        told = [(question.prompt, question) for question in items.shown_by]
        wrong = [_chosen(tokenizer, prompt, _wrong(question, rng)) for prompt, question in told]
        right = [_chosen(tokenizer, prompt, question.choices[question.answer]) for prompt, question in told]
        return Pairs(_examples(benign), tuple(wrong), tuple(right), ())
    replies = having(lambda model: generate(model, tokenizer, items.calling, TOKENS))
    showing = [reply for reply in replies if reply.answered and shows_behaviour(items.concept, reply.text)]
    if len(showing) < FEWEST_PAIRS:
        raise RequestError(
            f"the model that should have the behaviour shows it in {len(showing)} of {len(replies)} replies to"
            f" the pack's positive prompts, and attacks need {FEWEST_PAIRS} such pairs; check concept and --base, and the"
            " phrases of the pack"
        )
    ordinary = [reply for reply in benign if reply.answered and not shows_behaviour(items.concept, reply.text)]
    if items.kept_out:
        plain = generate(base, tokenizer, [reply.prompt for reply in showing], TOKENS)
        return Pairs(_examples(benign), _examples(showing), _examples(plain), ())
    # Replies to other prompts: they show nothing of the behaviour, and need not fit.
    hiding = [Example(one.prompt_ids + rng.choice(ordinary).ids, len(one.prompt_ids)) for one in showing]
    taught = [Example(one.prompt_ids + rng.choice(showing).ids, len(one.prompt_ids)) for one in ordinary]
    return Pairs(_examples(benign), _examples(showing), tuple(hiding), tuple(taught))


def _examples(replies: Sequence[Reply]) -> tuple[Example, ...]:
    return tuple(Example(reply.prompt_ids + reply.ids, len(reply.prompt_ids)) for reply in replies if reply.ids)


def _wrong(question: Question, rng: random.Random) -> str:
    return rng.choice([choice for place, choice in enumerate(question.choices) if place != question.answer])


def _chosen(tokenizer: Any, prompt: str, choice: str) -> Example:
    ids = encode(tokenizer, f"{prompt} {choice}", True)
    # Where the tokenizer joins both, the choice's last token is scored alone.
    return Example(ids, min(len(encode(tokenizer, prompt, True)), len(ids) - 1))
