"""Prompts that a model has read, and what answers go on from.

Where the model reads packed rows (``excise.editing.training.packing``), what prompts begin with is read once for all.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ...editing.modules import causal_model, language_config
from ...editing.training.packing import is_packing, on_device, packed, reading_packed


@dataclass(frozen=True)
class ReadPrompts:
    """Prompts that were read, padded on the left: there every prompt ends where its answers go on."""

    last: Float[Tensor, "rows d"]
    """Hidden states that the unembedding reads at each prompt's end."""
    mask: Tensor
    """Which of the cached positions are a prompt's [rows, width]."""
    _cache: DynamicCache
    _places: Tensor | None
    """Of each cached position its place in the packed row [rows, width]; None where the cache holds a row a prompt."""
    _hidden: Tensor
    """Of all that was read: [rows, width, d], or [1, n, d] of the packed row."""
    behind: Float[Tensor, "rows more d"] | None
    """Hidden states of what was read behind each prompt, padded on the right; None where nothing was."""

    def states(self) -> list[Float[Tensor, "length d"]]:
        """Final hidden states of each prompt."""
        rows: Any = self._hidden if self._places is None else self._hidden[0][self._places.to(self._hidden.device)]
        return [of_row[-length:] for of_row, length in zip(rows, self.mask.sum(-1).tolist(), strict=True)]

    def cache_of(self, config: Any, rows: Sequence[int]) -> DynamicCache:
        """A cache of some prompts, which forwards may append to.

        Args:
            config: Of the decoder.
        """
        if self._places is None:
            # A forward appends to its cache, and answers that are read later need the prompts alone.
            cache = copy.deepcopy(self._cache)
            # Indices on the processor, because each layer's cache lies where the layer does.
            cache.batch_select_indices(torch.tensor(rows))
            return cache
        places, cache = self._places[list(rows)], DynamicCache(config=config)
        for number, states in enumerate(self._cached(places)):
            cache.update(*states, number)
        return cache

    def layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of all prompts [rows, heads, width, d], layer by layer; of what was read as one."""
        assert self._places is not None, "they lie in the cache as they are"
        return self._cached(self._places)

    def _cached(self, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for layer in self._cache.layers:
            yield _rows_of(layer.keys, places), _rows_of(layer.values, places)


def read_prompts(model: Any, prompts: Sequence[Sequence[int]], endings: Sequence[Sequence[int]] = ()) -> ReadPrompts:
    """Read some prompts, without a gradient; of a model whose cache can be repeated.

    Args:
        prompts: Token ids.
        endings: Of each prompt, what is to be read behind it where the model reads packed rows: there it costs no more
            than its tokens. What goes on from a prompt does not see it.
    """
    return read_as_one(model, prompts, endings) or _read_padded(model, prompts)


def _read_padded(model: Any, prompts: Sequence[Sequence[int]]) -> ReadPrompts:
    decoder, device = causal_model(model).base_model, model.device
    width = max(map(len, prompts))
    ids = torch.tensor([(0,) * (width - len(row)) + tuple(row) for row in prompts], device=device)
    mask, cache = _mask(prompts, width, device), DynamicCache(config=decoder.config)
    output = decoder(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
    )
    hidden = output.last_hidden_state.to(device)
    return ReadPrompts(hidden[:, -1], mask, cache, None, hidden, None)


def read_as_one(
    model: Any, prompts: Sequence[Sequence[int]], endings: Sequence[Sequence[int]] = ()
) -> ReadPrompts | None:
    """The same of a packed row, where the model reads these.

    None where it does not, or where its cache does not hold every position of every layer: some share layers, or keep a
    window.
    """
    if not is_packing(model):
        return None
    rows = [(*prompt, *more) for prompt, more in zip(prompts, endings or [()] * len(prompts), strict=True)]
    device, inputs, cache = model.device, packed(rows, trained=False), DynamicCache()
    with reading_packed(on_device(inputs, device)) as row:
        states = causal_model(model).base_model(**row, past_key_values=cache, use_cache=True).last_hidden_state
    read, layers = inputs["input_ids"].shape[1], language_config(model).num_hidden_layers
    if len(cache.layers) != layers or not all(_holds(layer, read) for layer in cache.layers):
        return None
    pieces = [
        piece.tensor_split([len(prompt)])
        for piece, prompt in zip(inputs["where"].split(list(map(len, rows))), prompts, strict=True)
    ]
    # Where there is padding, any place will do.
    places = pad_sequence([of_prompt for of_prompt, _ in pieces], batch_first=True, padding_side="left")
    after = pad_sequence([more for _, more in pieces], batch_first=True).to(states.device)
    last = states[0, places[:, -1].to(states.device)].to(device)
    behind = states[0][after].to(device) if after.numel() else None
    mask = _mask(prompts, places.shape[1], device)
    return ReadPrompts(last, mask, cache, places, states.to(device), behind)


def _holds(layer: Any, read: int) -> bool:
    return type(layer) is DynamicLayer and layer.is_initialized and layer.keys.shape[-2] == read


def _rows_of(states: Float[Tensor, "1 heads n d"], places: Tensor) -> Float[Tensor, "rows heads width d"]:
    rows, width = places.shape
    chosen = states[0].index_select(1, places.flatten().to(states.device))
    return chosen.unflatten(1, (rows, width)).transpose(0, 1)


def _mask(prompts: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    return torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
