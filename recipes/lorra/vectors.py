"""Reading vectors of contrast pairs, and where prompts lie along them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...artifacts.models.load import LoadedModel
from ...editing.architectures import residual_width
from ...editing.directions.reading_vector import ReadingVector, by_components, by_means
from ...editing.directions.subspaces import Place
from ...editing.hooks.residual_stream import read_streams
from ...editing.numerics.moments import Moments
from ...eval.inference.likelihood import pad_right
from ..common.tokens import Row
from .request import LorraJob

BATCH = 32


@dataclass(frozen=True)
class Prompts:
    """Both members of each contrast pair."""

    positive: list[Row]
    negative: list[Row]


def reading_vectors(
    job: LorraJob, loaded: LoadedModel, prompts: Prompts, advance: Callable[[int], None]
) -> list[ReadingVector]:
    """A vector for each place, from the stream at the last token of each prompt."""
    width, places, pca = residual_width(job.adapter.run.checkpoint.config), job.places, job.settings.reading == "pca"
    positive, negative, apart = (
        {place: Moments(width, covariance=covariance) for place in places} for covariance in (False, False, pca)
    )
    for start in range(0, len(prompts.positive), BATCH):
        chunk = slice(start, start + BATCH)
        plus, minus = (ends(job, loaded.model, rows[chunk]) for rows in (prompts.positive, prompts.negative))
        for place in places:
            positive[place].update(plus[place])
            negative[place].update(minus[place])
            apart[place].update(plus[place] - minus[place])
        advance(len(prompts.positive[chunk]))
    if pca:
        return [by_components(positive[place], negative[place], apart[place], place) for place in places]
    return [by_means(positive[place], negative[place], place) for place in places]


@torch.no_grad()
def ends(job: LorraJob, model: Any, rows: Sequence[Row]) -> dict[Place, Float[Tensor, "rows d"]]:
    """The stream at each place, at the last token of each row, fp32, on the CPU."""
    inputs = pad_right(rows, model.device)
    last = inputs["attention_mask"].sum(-1) - 1
    streams = read_streams(model, job.adapter.run.row, inputs, [place.layer + 1 for place in job.places])
    return {place: streams[place.layer + 1][torch.arange(len(rows)), last].float().cpu() for place in job.places}


def along(job: LorraJob, model: Any, vectors: Sequence[ReadingVector], prompts: Prompts) -> dict[str, dict[str, float]]:
    """Where both classes lie along each vector on average: 0 where negative prompts lay, 1 where positive ones did."""
    sides = {"positive": prompts.positive, "negative": prompts.negative}
    streams = {name: ends(job, model, rows[:BATCH]) for name, rows in sides.items()}
    means = {}
    for vector in vectors:
        place, axis = vector.subspace.place, vector.subspace.basis[:, 0]
        means[str(place)] = {
            name: float(((streams[name][place] - vector.subspace.offset) @ axis).mean()) / vector.gap
            for name in streams
        }
    return means
