"""Which of an autoencoder's latents carry a concept: a score for each, by which the first few are chosen."""

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ...artifacts.models.load import LoadedModel
from ...editing.directions.sae_latents import SparseLatents
from ...editing.hooks.concept_ablation import changed_at
from ...editing.modules import causal_model
from ...editing.wiring.row import Architecture
from ...eval.concept import ContrastPair
from ..common.examples import Example, example_batch, sequence_nll
from ..common.tokens import encode
from .direction_sources import BATCH, activations

Score = Literal["contrast", "attribution"]
SCORES: tuple[Score, ...] = get_args(Score)
ROWS = 8
"""Sequences whose loss is differentiated at once."""


def ranked(latents: SparseLatents, scores: Float[Tensor, " k"], count: int) -> SparseLatents:
    """The ``count`` latents of the largest scores, largest first."""
    top = scores.topk(min(count, len(scores)))
    return latents.pick(top.indices.tolist(), top.values.tolist())


def by_contrast(
    loaded: LoadedModel, row: Architecture, latents: SparseLatents, pairs: Sequence[ContrastPair]
) -> Float[Tensor, " k"]:
    """How much more each writes in one member of the pairs than in the other: the size of the mean difference, in
    norms."""
    total = torch.zeros(len(latents.numbers))
    for sign, texts in ((1, [pair.positive for pair in pairs]), (-1, [pair.negative for pair in pairs])):
        rows = [encode(loaded.tokenizer, text, True) for text in texts]
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            hidden = activations(loaded.model, row, part, [latents.place])[latents.place]
            for index, ids in enumerate(part):
                total += sign * latents.values(hidden[index, : len(ids)]).mean(0)
    return (total / len(pairs)).abs() * latents.decoder.norm(dim=1)


def by_attribution(
    loaded: LoadedModel, row: Architecture, latents: SparseLatents, examples: Sequence[Example]
) -> Float[Tensor, " k"]:
    """First-order effect of each on the loss: the size of ``sum over tokens of f_i (d_i . dL/dh)``, in nats a sequence.

    Source: attribution patching to zero, as CAFT ranks latents (Casademunt et al. 2025, section 3).
    """
    total = torch.zeros(len(latents.numbers))
    for start in range(0, len(examples), ROWS):
        part = examples[start : start + ROWS]
        for hidden, gradient in _gradients(loaded, row, latents, part):
            total += (latents.values(hidden) * (gradient @ latents.decoder.T)).sum(0)
    return (total / len(examples)).abs()


def _gradients(
    loaded: LoadedModel, row: Architecture, latents: SparseLatents, examples: Sequence[Example]
) -> Iterable[tuple[Tensor, Tensor]]:
    """Activations of each sequence at the latents' place, and the gradient of its loss there [tokens, d], on the
    CPU."""
    model = causal_model(loaded.model)
    seen: list[Tensor] = []

    def see(hidden: Tensor) -> Tensor:
        # Detached from what is below, so that the backward pass ends here.
        seen.append(hidden.detach().requires_grad_())
        return seen[-1]

    with changed_at(model, row, latents.place, see):
        batch = {key: value.to(loaded.device) for key, value in example_batch(examples).items()}
        # Rows do not depend on each other, so the gradient of the sum holds each row's own.
        loss = (sequence_nll(model, batch) / batch["lengths"]).sum()
    (gradient,) = torch.autograd.grad(loss, seen)
    for index, example in enumerate(examples):
        length = len(example.ids)
        yield seen[0].detach()[index, :length].float().cpu(), gradient[index, :length].float().cpu()
