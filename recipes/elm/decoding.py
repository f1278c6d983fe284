"""Sampling what an edited target would say, many contexts at a time, with all its rows in lockstep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...artifacts.models.memory import free_memory
from ...editing.modules import language_config
from ...editing.training.edited_target import TargetEdit
from ...editing.training.soft_targets import SoftTargets, keep_top, wide
from ...eval.inference.batches import read_in_batches
from ...eval.inference.generation import end_tokens
from ...eval.inference.lockstep import Lockstep, cached_bytes, draw
from ..common.tokens import Row
from .teacher import Teacher

ROWS = 192
"""Rows decoded at a time, at most."""
CACHE_BUDGET = 192 << 20
"""Bytes of keys and values held at a time on a processor: more would hardly be faster."""
DEVICE_CACHE_BUDGET = 4 << 30
"""The same on an accelerator."""


@dataclass(frozen=True)
class Continuation:
    """What was drawn after a context."""

    ids: Row
    """An end token included."""
    predicted: SoftTargets
    """What is predicted after each of ``ids``: by the bare row, or by the edited target."""


@dataclass(frozen=True)
class Decoding:
    """How contexts are continued."""

    edit: TargetEdit | None
    """What tokens are drawn from, of a bare, an expert's and a novice's row; None draws from the bare row, and no other
    runs."""
    tokens: int
    """Tokens of a continuation, at most."""
    stored_tokens: int
    """Tokens stored of each prediction, at most."""
    learned: TargetEdit | None = None
    """The edit of the predictions that are left behind; None leaves those of the bare row."""


@dataclass(frozen=True)
class Start:
    """What a continuation goes on from: the bare row, and an expert's and a novice's where these are read too."""

    rows: tuple[Row, ...]
    remembered: tuple[int, ...]
    """Last positions of each row that the teacher is to remember."""


DrawFirst = Callable[[Sequence[int]], Sequence[int]]
"""The first tokens of some contexts, by index; called once the teacher remembers their rows."""


@torch.no_grad()
def decode(
    teacher: Teacher,
    tokenizer: Any,
    starts: Sequence[Start],
    first: DrawFirst | None,
    how: Decoding,
    generator: torch.Generator,
) -> list[Continuation]:
    """Continue each context by at most ``how.tokens``.

    Every token is drawn from the edited distribution, and all rows of a context go on with it. What is drawn for a
    context does not depend on how many are decoded together. The teacher remembers what is read on the way.

    Args:
        starts: All with as many rows: one, or three where ``how`` edits.
        first: Says the first tokens, where the rows do not.
    """
    model = teacher.model
    # Drawn for all contexts before any is decoded, so that draws do not depend on which contexts share a batch.
    chances = torch.rand(len(starts), how.tokens, generator=generator, device=generator.device)
    continuations: dict[int, Continuation] = {}
    width, ends = max((len(start.rows) for start in starts), default=1), end_tokens(model, tokenizer)

    def read_and_go_on(batch: list[int]) -> list[Continuation]:
        rows = [row for index in batch for row in starts[index].rows]
        wanted = [count for index in batch for count in starts[index].remembered]
        lockstep = Lockstep(model, rows, how.tokens)
        states = lockstep.read()
        for row, of_row, count in zip(rows, states, wanted, strict=True):
            if count:
                teacher.remember(row, of_row, count)
        if first:
            chosen = torch.tensor(first(batch), device=model.device)
        else:
            last = torch.stack([of_row[-1] for of_row in states])
            chosen = draw(predicted(teacher.head(last), how.edit, width), chances[batch, 0])
        return _go_on(lockstep, teacher, ends, chosen, chances[batch], how)

    lengths = [max(map(len, start.rows)) + how.tokens for start in starts]
    tokens = cache_budget(model.device, free_memory(model.device)) // (cached_bytes(model) * width)
    for batch, continued in read_in_batches(lengths, tokens, read_and_go_on, most=ROWS // width):
        continuations.update(zip(batch, continued, strict=True))
        teacher.advance(len(batch))
    return [continuations[index] for index in range(len(starts))]


def cache_budget(device: torch.device, free: int) -> int:
    """Bytes of keys and values held at a time: a quarter of what is free, and no more than is worth it."""
    return max(1, min(DEVICE_CACHE_BUDGET if device.type == "cuda" else CACHE_BUDGET, free // 4))


def _go_on(
    lockstep: Lockstep,
    teacher: Teacher,
    ends: set[int],
    chosen: Int[Tensor, " contexts"],
    chances: Float[Tensor, "contexts tokens"],
    how: Decoding,
) -> list[Continuation]:
    """Feed each context a token and draw the next, until there are all or each has ended; the first is given.

    The rows of a context go on with the same token.
    """
    contexts, tokens = chances.shape
    width, device = len(lockstep.ids) // contexts, lockstep.ids.device
    drawn: list[list[int]] = [[] for _ in range(contexts)]
    done = [False] * contexts
    # Tensors held one by one between temporaries many times their size would pin the memory around them.
    stored = min(how.stored_tokens, int(language_config(teacher.model).vocab_size))
    top = torch.empty(contexts, tokens, stored, dtype=torch.long, device=device)
    dtype = torch.promote_types(teacher.model.dtype, torch.float32)
    top_log_p = torch.empty(top.shape, device=device, dtype=dtype)
    rest = torch.empty(contexts, tokens, device=device, dtype=dtype)
    # Nothing is drawn after the last token, but it is read, for what is predicted behind it.
    for turn, chance in enumerate((*chances[:, 1:].to(device).unbind(1), None)):
        for place, token in enumerate(chosen.tolist()):
            if not done[place]:
                drawn[place].append(token)
                done[place] = token in ends
        # The head is the dearest part of a step: what is left behind and what is drawn read it once.
        logits = teacher.head(lockstep.feed(chosen.repeat_interleave(width)))
        left = keep_top(predicted(logits, how.learned, width), stored)
        top[:, turn], top_log_p[:, turn], rest[:, turn] = left.ids, left.log_p, left.rest
        if chance is None or all(done):
            break
        chosen = draw(predicted(logits, how.edit, width), chance)
    return [
        Continuation(tuple(ids), SoftTargets(top[place], top_log_p[place], rest[place])[: len(ids)])
        for place, ids in enumerate(drawn)
    ]


def predicted(logits: Float[Tensor, "rows v"], edit: TargetEdit | None, width: int) -> Float[Tensor, "contexts v"]:
    """Log-probabilities of each context's next token, from the logits of its ``width`` rows, the bare one first."""
    if edit is None:
        return wide(logits[::width]).log_softmax(-1)
    log_p = (wide(logits) / edit.temperature).log_softmax(-1)
    bare, expert, novice = log_p.unflatten(0, (-1, width)).unbind(1)
    return edit.log_p(bare, expert, novice)
