"""Sampling what an edited target would say, many contexts at a time, with all its streams in lockstep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import StaticCache

from ..editing.soft_targets import SoftTargets, keep_top
from ..eval.generation import end_tokens
from .prefixes import Row
from .teacher import Item

ROWS = 192
"""Rows decoded at a time, at most."""
CACHE_BUDGET = 192 << 20
"""Bytes of keys and values held at a time on a processor: more would hardly be faster."""
DEVICE_CACHE_BUDGET = 4 << 30
"""The same on an accelerator."""


@dataclass(frozen=True)
class Continuation:
    """What was drawn after a context's given token."""

    ids: Row
    """An end token included."""
    own: SoftTargets
    """What the bare stream predicts after the given token and after each that was drawn: one more than ``ids``."""


@torch.no_grad()
def decode(
    model: Any, tokenizer: Any, starts: Sequence[tuple[Item, int]], strength: float, tokens: int, kept: int,
    generator: torch.Generator, advance: Callable[[int], None] = lambda _: None,
) -> list[Continuation]:  # fmt: skip
    """Continue each context after its given first token by at most ``tokens`` more.

    Every token is drawn from ``p0 (p_novice / p_expert)^strength``, and the bare, expert and novice rows of a context
    all go on with it. At strength 0 only the bare rows run. What is drawn for a context does not depend on how many are
    decoded together.

    Args:
        kept: Tokens of each of the bare stream's predictions, at most.
        advance: Called with the number of contexts that were continued.
    """
    chances = torch.rand(len(starts), tokens, generator=generator, device=generator.device)
    streams = [_streams(item, strength) for item, _ in starts]
    found: dict[int, Continuation] = {}
    # Contexts of like length stand together, so that little is padding.
    order = sorted(range(len(starts)), key=lambda index: -max(len(row) for row in streams[index]))
    width = max(map(len, streams), default=1)
    budget = DEVICE_CACHE_BUDGET if model.device.type == "cuda" else CACHE_BUDGET
    begin = 0
    while begin < len(order):
        length = max(len(row) for row in streams[order[begin]]) + 1 + tokens
        rows_at_once = min(ROWS, budget // (length * cached_bytes(model)))
        batch = order[begin : begin + max(1, rows_at_once // width)]
        begin += len(batch)
        rows = [(*row, starts[index][1]) for index in batch for row in streams[index]]
        found.update(
            zip(batch, _decode_batch(model, tokenizer, rows, width, strength, chances[batch], kept), strict=True)
        )
        advance(len(batch))
    return [found[index] for index in range(len(starts))]


def cached_bytes(model: Any) -> int:
    """Bytes of keys and values that one token leaves behind."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def _streams(item: Item, strength: float) -> list[Row]:
    if strength == 0:
        return [item.ids]
    expert = item.experts[0] if item.experts else item.ids
    return [item.ids, expert, item.novices[0]]


def _decode_batch(
    model: Any, tokenizer: Any, rows: Sequence[Row], width: int, strength: float,
    chances: Float[Tensor, "contexts tokens"], kept: int,
) -> list[Continuation]:  # fmt: skip
    padded = tokenizer.pad(
        {"input_ids": [list(row) for row in rows]}, padding=True, padding_side="left", return_tensors="pt"
    )
    ids, mask = padded["input_ids"].to(model.device), padded["attention_mask"].to(model.device)
    ends, (contexts, tokens) = end_tokens(model, tokenizer), chances.shape
    # A cache that grows is copied at every token.
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + tokens)
    said: list[list[int]] = [[] for _ in range(contexts)]
    done = [bool(row[-1] in ends) for row in rows[::width]]
    position = mask.cumsum(-1) - 1
    step, step_positions = ids, position.clamp_min(0)
    # Kept one by one between temporaries many times their size, they would pin the memory around them.
    kept = min(kept, int(model.config.vocab_size))
    top = torch.empty(contexts, tokens + 1, kept, dtype=torch.long, device=ids.device)
    top_log_p, rest = torch.empty(top.shape, device=ids.device), torch.empty(contexts, tokens + 1, device=ids.device)
    for turn, chance in enumerate((*chances.to(ids.device).unbind(1), None)):
        output = model(
            input_ids=step, attention_mask=mask, position_ids=step_positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        log_p = output.logits[:, -1].float().log_softmax(-1)
        own = keep_top(log_p[::width], kept)
        top[:, turn], top_log_p[:, turn], rest[:, turn] = own.ids, own.log_p, own.rest
        if chance is None or all(done):
            break
        chosen = _draw(log_p, width, strength, chance)
        for place, token in enumerate(chosen.tolist()):
            if not done[place]:
                said[place].append(token)
                done[place] = token in ends
        step = chosen.repeat_interleave(width)[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
        step_positions = step_positions[:, -1:] + 1
    return [
        Continuation(tuple(ids), SoftTargets(top[place], top_log_p[place], rest[place])[: len(ids) + 1])
        for place, ids in enumerate(said)
    ]


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
