"""Tier 1: inputs are optimized, the weights stay as they are."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....editing.architectures import architecture_of, layer_count
from ....editing.training.parallel_adapters import ParallelAdapters, embedded, latent_attackers, soft_prompt_attackers
from ...common.examples import Example, example_batch, scored_nats
from ..attack_data import AttackData
from .table import PREFIX_TOKENS, SOFT_TOKENS

ROUNDS = 24
"""Rounds of the prefix search."""
TRIES = 24
"""Swaps tried in each round."""
SWAPS = 32
"""Tokens considered at each place."""
SEARCH_ROWS = 16
"""Sequences whose loss is looked at."""


@contextmanager
def soft_prompt(model: Any, seeds: Sequence[int]) -> Iterator[ParallelAdapters]:
    """Embeddings in front of the question."""
    with soft_prompt_attackers(model, SOFT_TOKENS, seeds) as adapters:
        yield adapters


@contextmanager
def latent(model: Any, seeds: Sequence[int]) -> Iterator[ParallelAdapters]:
    """One vector added to the residual stream at the middle layer."""
    config = model.config.to_dict()
    with latent_attackers(model, architecture_of(config), layer_count(config) // 2, seeds) as adapters:
        yield adapters


def prefix(model: Any, data: AttackData) -> Sequence[float]:
    """Ask behind the tokens that a search on T finds."""
    searched = search_prefix(model, data)
    with soft_prompt_attackers(model, PREFIX_TOKENS, [0]) as adapters:
        adapters.owned[0][0].data = embedded(model, torch.tensor(searched.ids))
        return data.multiple_choice.hits(model, PREFIX_TOKENS)


@dataclass(frozen=True)
class Prefix:
    """Tokens in front of every question, and the mean loss on T after each round of the search, in nats."""

    ids: tuple[int, ...]
    losses: tuple[float, ...]


def search_prefix(model: Any, data: AttackData) -> Prefix:
    """Search tokens whose presence makes answers of group T likely: one prefix for all questions.

    Each round tries some of the swaps that the gradient at the embeddings suggests and keeps the best one if it helps.

    Source: greedy coordinate gradient, Zou et al. 2023.
    """
    # Fixed seeds, so that every model is searched alike.
    rng, generator = random.Random("excise prefix"), torch.Generator().manual_seed(0)
    table = model.get_input_embeddings().weight.detach()
    examples = rng.sample(data.examples["T"], k=min(SEARCH_ROWS, len(data.examples["T"])))
    ids = torch.randint(table.shape[0], (PREFIX_TOKENS,), generator=generator)
    with _loss_behind_prefix(model, examples) as (loss, embeddings):
        current = loss(ids)
        losses = [float(current.detach())]
        for _ in range(ROUNDS):
            (gradient,) = torch.autograd.grad(current, embeddings)
            # A swap to token v changes the loss by about (e_v - e_old) times the gradient, of which only the first part
            # depends on v; a scale of all embeddings changes no order.
            swaps = (-gradient @ table.float().T).topk(SWAPS, -1).indices.cpu()
            best_loss, best_ids = min((_tried(loss, ids, swaps, rng) for _ in range(TRIES)), key=lambda pair: pair[0])
            if best_loss < losses[-1]:
                ids = best_ids
            current = loss(ids)
            losses.append(min(best_loss, losses[-1]))
    return Prefix(tuple(ids.tolist()), tuple(losses))


@contextmanager
def _loss_behind_prefix(model: Any, examples: Sequence[Example]) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Mean nats of the examples behind a prefix of token ids, and the embeddings at which it has a gradient."""
    table = model.get_input_embeddings().weight.detach()
    behind = [Example(((0,) * PREFIX_TOKENS) + e.ids, e.start + PREFIX_TOKENS) for e in examples]
    batch = {key: value.to(table.device) for key, value in example_batch(behind).items()}
    with soft_prompt_attackers(model, PREFIX_TOKENS, [0]) as adapters:
        (embeddings,) = adapters.owned[0]

        def loss(ids: Tensor) -> Tensor:
            # The parameter keeps its identity, because the hooks hold it and the gradient is asked for at it.
            embeddings.data = embedded(model, ids)
            return scored_nats(model, batch).mean()

        yield loss, embeddings


@torch.no_grad()
def _tried(loss: Callable[[Tensor], Tensor], ids: Tensor, swaps: Tensor, rng: random.Random) -> tuple[float, Tensor]:
    """The loss of the prefix with one suggested swap, and that prefix."""
    place = rng.randrange(PREFIX_TOKENS)
    swapped = ids.clone()
    swapped[place] = swaps[place, rng.randrange(SWAPS)]
    return float(loss(swapped)), swapped
