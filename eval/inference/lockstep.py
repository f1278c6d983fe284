"""Rows that go on together, a token at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import StaticCache

from ...editing.architectures import layer_count
from ...editing.modules import causal_model, language_config
from ...editing.numerics.cpu_attention import products_everywhere
from .caches import takes_cache
from .likelihood import pad_left, tokens_of_batch
from .read_prompts import read_as_one

LENGTH_DEPENDENT = {"dynamic", "longrope"}
"""Kinds of rotary positions that change for all of a row when it grows past some length."""
REPLY_TOKENS = 4096
"""Tokens of the replies that are made together, at least."""
SMALL_CACHE = 64 << 20
"""Bytes of keys and values that are little on any machine."""


class Lockstep:
    """Rows of a batch, padded on the left, that are read and then fed token by token.

    Example:
        >>> rows = Lockstep(model, [(5, 9, 7), (40,)], tokens=8)
        >>> last = torch.stack([states[-1] for states in rows.read()])
        >>> last = rows.feed(unembedding(model)(last).argmax(-1))
    """

    def __init__(self, model: Any, rows: Sequence[Sequence[int]], tokens: int):
        """Args:
        tokens: How many a row is fed, at most.
        """
        padded = pad_left(rows, model.device)
        self.model, self.rows, self.ids, self.mask = model, rows, padded["input_ids"], padded["attention_mask"]
        self.positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        # A cache that grows is copied at every token. Without one, all is read again at every token.
        self.cache = None
        if takes_cache(model):
            self.cache = StaticCache(config=model.config, max_cache_len=self.ids.shape[1] + tokens)

    def read(self) -> list[Float[Tensor, "length d"]]:
        """Final hidden states of each row. What rows begin with is read once, where the model can."""
        if self.cache is not None and (as_one := read_as_one(self.model, self.rows)) is not None:
            for number, layer in enumerate(as_one.layers()):
                self.cache.update(*layer, number)
            return as_one.states()
        return [states[-len(row) :] for row, states in zip(self.rows, self._forward(self.ids), strict=True)]

    def feed(self, chosen: Int[Tensor, " rows"]) -> Float[Tensor, "rows d"]:
        """Go on with a token in each row; final hidden states behind it."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], -1)
        self.positions = self.positions[:, -1:] + 1
        if self.cache is None:
            self.ids = torch.cat([self.ids, chosen[:, None]], -1)
        return self._forward(chosen[:, None])[:, -1]

    def keep(self, places: Int[Tensor, " kept"]) -> None:
        """Go on with some rows alone, in this order."""
        self.mask, self.positions = self.mask[places], self.positions[places]
        if self.cache is None:
            self.ids = self.ids[places]
        else:
            self.cache.reorder_cache(places)

    @products_everywhere()
    def _forward(self, ids: Tensor) -> Float[Tensor, "rows length d"]:
        decoder = causal_model(self.model).base_model
        if self.cache is None:
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


def goes_on_in_step(model: Any) -> bool:
    """Whether rows of this model may go on so: it is the library's own, reads on from a cache, and turns a position by
    the same angles however long the row has become."""
    inner = causal_model(model)
    turns = getattr(language_config(model), "rope_parameters", None) or {}
    # Layers of different kinds may each have their own.
    kinds = {one.get("rope_type") for one in (turns, *turns.values()) if isinstance(one, dict)}
    return type(inner).__module__.startswith("transformers.") and takes_cache(model) and not kinds & LENGTH_DEPENDENT


def tokens_of_replies(model: Any, device: torch.device) -> int:
    """Tokens, with those of their prompts, of the replies that are made together. The model need not be loaded."""
    few = max(tokens_of_batch(int(language_config(model).vocab_size), device), REPLY_TOKENS)
    return max(few, SMALL_CACHE // cached_bytes(model))


def cached_bytes(model: Any) -> int:
    """Bytes of keys and values that one token leaves behind."""
    config = language_config(model)
    many = getattr(config, "num_attention_heads", None)
    # State-space models have no heads of attention; a token leaves no more than a stream behind.
    heads = getattr(config, "num_key_value_heads", None) or many or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // (many or 1)
    return int(2 * layer_count(model.config.to_dict()) * heads * width * model.dtype.itemsize)


def draw(log_p: Float[Tensor, "rows v"], chances: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The token at which each row's cumulative probability passes a chance between 0 and 1."""
    passed = log_p.exp().cumsum(-1)
    # Rounded, the whole is not quite 1.
    limits = (chances.to(passed) * passed[:, -1])[:, None]
    places = torch.searchsorted(passed, limits, right=True)[:, 0].clamp_max(log_p.shape[-1] - 1)
    # A chance of 1 would draw a token behind the last that has any probability.
    likely = (passed < passed[:, -1:]).sum(-1)
    return torch.minimum(places, likely.clamp_max(log_p.shape[-1] - 1))
