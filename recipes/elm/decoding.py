"""Sampling what an edited target would say, many contexts at a time, with all its rows in lockstep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import StaticCache

from ...artifacts.models.memory import free_memory
from ...editing.architectures import layer_count
from ...editing.modules import causal_model, language_config
from ...editing.numerics.cpu_attention import products_everywhere
from ...editing.training.edited_target import TargetEdit
from ...editing.training.soft_targets import SoftTargets, keep_top, wide
from ...eval.inference.batches import read_in_batches
from ...eval.inference.caches import takes_cache
from ...eval.inference.generation import end_tokens
from ...eval.inference.likelihood import pad_left
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
    width = max((len(start.rows) for start in starts), default=1)

    def read_and_go_on(batch: list[int]) -> list[Continuation]:
        rows = [row for index in batch for row in starts[index].rows]
        wanted = [count for index in batch for count in starts[index].remembered]
        lockstep = _Lockstep(model, tokenizer, rows, how.tokens)
        states = lockstep.read()
        for row, of_row, count in zip(rows, states, wanted, strict=True):
            if count:
                teacher.remember(row, of_row, count)
        if first:
            chosen = torch.tensor(first(batch), device=model.device)
        else:
            last = torch.stack([of_row[-1] for of_row in states])
            chosen = draw(predicted(teacher.head(last), how.edit, width), chances[batch, 0])
        return lockstep.go_on(teacher, chosen, chances[batch], how)

    lengths = [max(map(len, start.rows)) + how.tokens for start in starts]
    tokens = cache_budget(model.device, free_memory(model.device)) // (cached_bytes(model) * width)
    for batch, continued in read_in_batches(lengths, tokens, read_and_go_on, most=ROWS // width):
        continuations.update(zip(batch, continued, strict=True))
        teacher.advance(len(batch))
    return [continuations[index] for index in range(len(starts))]


def cache_budget(device: torch.device, free: int) -> int:
    """Bytes of keys and values held at a time: a quarter of what is free, and no more than is worth it."""
    return max(1, min(DEVICE_CACHE_BUDGET if device.type == "cuda" else CACHE_BUDGET, free // 4))


def cached_bytes(model: Any) -> int:
    """Bytes of keys and values that one token leaves behind."""
    config = language_config(model)
    many = getattr(config, "num_attention_heads", None)
    # State-space models have no heads of attention; a token leaves no more than a stream behind.
    heads = getattr(config, "num_key_value_heads", None) or many or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // (many or 1)
    return int(2 * layer_count(model.config.to_dict()) * heads * width * model.dtype.itemsize)


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
        # A cache that grows is copied at every token. Without one, all is read again at every token.
        self.cache = None
        if takes_cache(model):
            self.cache = StaticCache(config=model.config, max_cache_len=self.ids.shape[1] + tokens)

    def read(self) -> list[Float[Tensor, "length d"]]:
        """Final hidden states of each row."""
        hidden = self._forward(self.ids)
        return [states[-len(row) :] for row, states in zip(self.rows, hidden, strict=True)]

    def go_on(
        self,
        teacher: Teacher,
        chosen: Int[Tensor, " contexts"],
        chances: Float[Tensor, "contexts tokens"],
        how: Decoding,
    ) -> list[Continuation]:
        """Feed each context a token and draw the next, until there are all or each has ended; the first is given."""
        contexts, tokens = chances.shape
        width, device = len(self.rows) // contexts, self.ids.device
        drawn: list[list[int]] = [[] for _ in range(contexts)]
        done = [False] * contexts
        # Tensors held one by one between temporaries many times their size would pin the memory around them.
        stored = min(how.stored_tokens, int(language_config(self.model).vocab_size))
        top = torch.empty(contexts, tokens, stored, dtype=torch.long, device=device)
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        top_log_p = torch.empty(top.shape, device=device, dtype=dtype)
        rest = torch.empty(contexts, tokens, device=device, dtype=dtype)
        # Nothing is drawn after the last token, but it is read, for what is predicted behind it.
        for turn, chance in enumerate((*chances[:, 1:].to(device).unbind(1), None)):
            for place, token in enumerate(chosen.tolist()):
                if not done[place]:
                    drawn[place].append(token)
                    done[place] = token in self.ends
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], -1)
            self.positions = self.positions[:, -1:] + 1
            hidden = self._forward(chosen.repeat_interleave(width)[:, None])
            # The head is the dearest part of a step: what is left behind and what is drawn read it once.
            logits = teacher.head(hidden[:, -1])
            left = keep_top(predicted(logits, how.learned, width), stored)
            top[:, turn], top_log_p[:, turn], rest[:, turn] = left.ids, left.log_p, left.rest
            if chance is None or all(done):
                break
            chosen = draw(predicted(logits, how.edit, width), chance)
        return [
            Continuation(tuple(ids), SoftTargets(top[place], top_log_p[place], rest[place])[: len(ids)])
            for place, ids in enumerate(drawn)
        ]

    @products_everywhere()
    def _forward(self, ids: Tensor) -> Float[Tensor, "rows length d"]:
        decoder = causal_model(self.model).base_model
        if self.cache is None:
            if ids is not self.ids:
                self.ids = torch.cat([self.ids, ids], -1)
            states: Tensor = decoder(input_ids=self.ids, attention_mask=self.mask, use_cache=False).last_hidden_state
            return states[:, -ids.shape[1] :].to(ids.device)
        hidden: Tensor = decoder(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        # The last layer of a model over several GPUs lies on another one than its first.
        return hidden.to(ids.device)


def predicted(logits: Float[Tensor, "rows v"], edit: TargetEdit | None, width: int) -> Float[Tensor, "contexts v"]:
    """Log-probabilities of each context's next token, from the logits of its ``width`` rows, the bare one first."""
    if edit is None:
        return wide(logits[::width]).log_softmax(-1)
    log_p = (wide(logits) / edit.temperature).log_softmax(-1)
    bare, expert, novice = log_p.unflatten(0, (-1, width)).unbind(1)
    return edit.log_p(bare, expert, novice)


def draw(log_p: Float[Tensor, "contexts v"], chances: Float[Tensor, " contexts"]) -> Int[Tensor, " contexts"]:
    """The token at which each context's cumulative probability passes a chance between 0 and 1."""
    passed = log_p.exp().cumsum(-1)
    # Rounded, the whole is not quite 1.
    limits = (chances.to(passed) * passed[:, -1])[:, None]
    places = torch.searchsorted(passed, limits, right=True)[:, 0].clamp_max(log_p.shape[-1] - 1)
    # A chance of 1 would draw a token behind the last that has any probability.
    likely = (passed < passed[:, -1:]).sum(-1)
    return torch.minimum(places, likely.clamp_max(log_p.shape[-1] - 1))
