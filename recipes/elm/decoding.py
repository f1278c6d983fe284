"""Sampling what an edited target would say, many contexts at a time, with all its streams in lockstep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import StaticCache

from ...editing.modules import causal_model, unembedding
from ...editing.numerics.cpu_attention import products_everywhere
from ...editing.training.soft_targets import SoftTargets, keep_top
from ...eval.inference.generation import end_tokens
from ...eval.inference.likelihood import pad_left
from ..common.tokens import Row
from .teacher import Item, Teacher

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
    bare: SoftTargets
    """What the bare stream predicts after each of ``ids``."""


@dataclass(frozen=True)
class Decoding:
    """How contexts are continued."""

    strength: float
    """Of the contrast between novice and expert; at 0 only the bare rows run."""
    tokens: int
    """Tokens of a continuation, at most."""
    stored_tokens: int
    """Tokens stored of each of the bare stream's predictions, at most."""


DrawFirst = Callable[[Sequence[int]], Sequence[int]]
"""The first tokens of some contexts, by index; called once the teacher remembers their rows."""


@torch.no_grad()
def decode(
    teacher: Teacher,
    tokenizer: Any,
    items: Sequence[tuple[Item, int]],
    first: DrawFirst,
    how: Decoding,
    generator: torch.Generator,
) -> list[Continuation]:
    """Continue each context by at most ``how.tokens``.

    Every token but the first is drawn from ``p0 (p_novice / p_expert)^strength``, and the bare, expert and novice rows
    of a context all go on with it. At strength 0 only the bare rows run. What is drawn for a context does not depend on
    how many are decoded together. The teacher remembers what is read on the way.

    Args:
        items: Each with the number of its bare row's last positions that are to be remembered.
    """
    model = teacher.model
    # Drawn for all contexts before any is decoded, so that draws do not depend on which contexts share a batch.
    chances = torch.rand(len(items), how.tokens - 1, generator=generator, device=generator.device)
    streams = [decoded_rows(item, how.strength) for item, _ in items]
    continuations: dict[int, Continuation] = {}
    # Contexts of like length stand together, so that little is padding.
    order = sorted(range(len(items)), key=lambda index: -max(len(row) for row in streams[index]))
    width = max(map(len, streams), default=1)
    budget = DEVICE_CACHE_BUDGET if model.device.type == "cuda" else CACHE_BUDGET
    begin = 0
    while begin < len(order):
        length = max(len(row) for row in streams[order[begin]]) + how.tokens
        rows_at_once = min(ROWS, budget // (length * cached_bytes(model)))
        batch = order[begin : begin + max(1, rows_at_once // width)]
        begin += len(batch)
        rows = [row for index in batch for row in streams[index]]
        lockstep = _Lockstep(model, tokenizer, rows, how.tokens)
        for place, (row, states) in enumerate(zip(rows, lockstep.read(), strict=True)):
            item, wanted = items[batch[place // width]]
            # Of the bare row more positions may be needed than those that carry the contrast.
            teacher.remember(row, states, item.count if place % width else wanted)
        chosen = torch.tensor(first(batch), device=model.device)
        continuations.update(zip(batch, lockstep.go_on(chosen, chances[batch], how), strict=True))
        teacher.advance(len(batch))
    return [continuations[index] for index in range(len(items))]


def cached_bytes(model: Any) -> int:
    """Bytes of keys and values that one token leaves behind."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def decoded_rows(item: Item, strength: float) -> list[Row]:
    """The rows of a context that decoding reads, the bare one first."""
    if strength == 0:
        return [item.ids]
    expert = item.experts[0] if item.experts else item.ids
    return [item.ids, expert, item.novices[0]]


class _Lockstep:
    """Rows of a batch that are read and then go on token by token, those of a context with the same."""

    def __init__(self, model: Any, tokenizer: Any, rows: Sequence[Row], tokens: int):
        """Args:
        tokens: How many a row goes on by, at most.
        """
        padded = pad_left(rows, model.device)
        self.model, self.rows, self.ends = model, rows, end_tokens(model, tokenizer)
        self.ids, self.mask = padded["input_ids"], padded["attention_mask"]
        self.positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        # A cache that grows is copied at every token.
        self.cache = StaticCache(config=model.config, max_cache_len=self.ids.shape[1] + tokens)

    def read(self) -> list[Float[Tensor, "length d"]]:
        """Final hidden states of each row."""
        hidden = self._forward(self.ids)
        return [states[-len(row) :] for row, states in zip(self.rows, hidden, strict=True)]

    def go_on(
        self, chosen: Int[Tensor, " contexts"], chances: Float[Tensor, "contexts more"], how: Decoding
    ) -> list[Continuation]:
        """Feed each context a token and draw the next, until a chance for each was used or all have ended."""
        contexts, tokens = len(chosen), chances.shape[1] + 1
        width, device = len(self.rows) // contexts, self.ids.device
        drawn: list[list[int]] = [[] for _ in range(contexts)]
        done = [False] * contexts
        # Tensors held one by one between temporaries many times their size would pin the memory around them.
        stored = min(how.stored_tokens, int(self.model.config.vocab_size))
        top = torch.empty(contexts, tokens, stored, dtype=torch.long, device=device)
        top_log_p, rest = torch.empty(top.shape, device=device), torch.empty(contexts, tokens, device=device)
        # Nothing is drawn after the last token, but it is read, for what the bare row predicts behind it.
        for turn, chance in enumerate((*chances.to(device).unbind(1), None)):
            for place, token in enumerate(chosen.tolist()):
                if not done[place]:
                    drawn[place].append(token)
                    done[place] = token in self.ends
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], -1)
            self.positions = self.positions[:, -1:] + 1
            hidden = self._forward(chosen.repeat_interleave(width)[:, None])
            log_p = unembedding(self.model)(hidden[:, -1]).float().log_softmax(-1)
            # The bare row is the first of each context's rows.
            bare = keep_top(log_p[::width], stored)
            top[:, turn], top_log_p[:, turn], rest[:, turn] = bare.ids, bare.log_p, bare.rest
            if chance is None or all(done):
                break
            chosen = _draw(log_p, width, how.strength, chance)
        return [
            Continuation(tuple(ids), SoftTargets(top[place], top_log_p[place], rest[place])[: len(ids)])
            for place, ids in enumerate(drawn)
        ]

    @products_everywhere()
    def _forward(self, ids: Tensor) -> Float[Tensor, "rows length d"]:
        hidden: Tensor = (
            causal_model(self.model)
            .base_model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=True,
            )
            .last_hidden_state
        )
        return hidden


def _draw(log_p: Float[Tensor, "rows v"], width: int, strength: float, chance: Float[Tensor, " contexts"]) -> Tensor:
    """The token at which the cumulative probability of each context passes a chance between 0 and 1."""
    if width > 1:
        bare, expert, novice = log_p.unflatten(0, (-1, width)).unbind(1)
        log_p = (bare + strength * (novice - expert)).log_softmax(-1)
    passed = log_p.exp().cumsum(-1)
    # Rounded, the whole is not quite 1.
    return torch.searchsorted(passed, (chance * passed[:, -1])[:, None], right=True)[:, 0].clamp_max(
        log_p.shape[-1] - 1
    )
