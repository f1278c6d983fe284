"""Where directions come from: contrast pairs, or what a fine-tune changes in the stream. One row each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...artifacts.models.load import LoadedModel
from ...editing.directions.subspaces import (
    Place,
    Subspace,
    least_squares_eraser,
    mass_mean,
    mean_difference,
    principal_components,
    ridge_probe,
)
from ...editing.errors import RequestError
from ...editing.hooks.concept_ablation import changed_at
from ...editing.hooks.residual_stream import run_decoder
from ...editing.modules import causal_model
from ...editing.numerics.moments import Moments
from ...editing.wiring.row import Architecture
from ...eval.concept import ContrastPair
from ...eval.inference.likelihood import pad_right
from ..common.examples import Example
from ..common.tokens import Row, encode

BATCH = 32
PAIRS_LEFT_OUT = "pairs_left_out"


@dataclass
class Readings:
    """Activations of one model at some places: the scored positions of some sequences, [tokens, d] a place."""

    rows: dict[Place, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, row: Architecture, examples: Sequence[Example], places: Sequence[Place]) -> "Readings":
        """Read what stands where something is to be said: the positions that predict scored tokens."""
        states: dict[Place, list[Tensor]] = {place: [] for place in places}
        for start in range(0, len(examples), BATCH):
            part = examples[start : start + BATCH]
            values = activations(model, row, [example.ids for example in part], places)
            for place in places:
                for index, example in enumerate(part):
                    # The position before a token predicts it.
                    states[place].append(values[place][index, example.start - 1 : len(example.ids) - 1])
        return cls({place: torch.cat(values) for place, values in states.items()})


@torch.no_grad()
def activations(model: Any, row: Architecture, rows: Sequence[Row], places: Sequence[Place]) -> dict[Place, Tensor]:
    """Activations at some places of right-padded rows [rows, positions, d], fp32, on the CPU."""
    inner = causal_model(model)
    states: dict[Place, Tensor] = {}

    def keep(place: Place) -> Callable[[Tensor], Tensor]:
        def see(hidden: Tensor) -> Tensor:
            states[place] = hidden.float().cpu()
            return hidden

        return see

    with ExitStack() as hooks:
        for place in places:
            hooks.enter_context(changed_at(inner, row, place, keep(place)))
        run_decoder(inner, pad_right(rows, inner.device))
    return states


def mean_projection(readings: Readings, subspaces: Sequence[Subspace]) -> dict[str, list[float]]:
    """Signed mean of the stream along each direction, by place."""
    return {
        str(s.place): [float(value) for value in readings.rows[s.place].mean(0) @ s.basis]
        for s in subspaces
        if s.place in readings.rows
    }


def refreshed(edited: Readings, base: Readings, subspaces: Sequence[Subspace]) -> dict[str, float]:
    """Share of what training changed in the stream that lies in the ablated span; the rest went elsewhere.

    Places that training left as they were have none.
    """
    shares = {}
    for subspace in subspaces:
        if subspace.place in edited.rows:
            change = edited.rows[subspace.place] - base.rows[subspace.place]
            left, _ = subspace.projector()
            if total := float(change.square().sum()):
                shares[str(subspace.place)] = float((change @ left).square().sum()) / total
    return shares


Found = tuple[Subspace, ...]


@dataclass(frozen=True)
class SourceInputs:
    """What a source may find directions from."""

    loaded: LoadedModel
    row: Architecture
    places: Sequence[Place]
    count: int
    """Number of directions at each place."""
    pairs: Sequence[ContrastPair]
    base: Readings
    """Of the base model."""
    tuned: Readings | None = None
    """Of the base after a plain fine-tune; only ``finetuned`` needs them."""


Source = Callable[[SourceInputs], Found]


def _pairs(inputs: SourceInputs) -> Found:
    """Components of the differences within pairs, not centred: the mean difference is part of what is looked for."""
    # The width is known once activations were read.
    differences = {place: Moments(0, covariance=True) for place in inputs.places}
    middles = {place: Moments(0) for place in inputs.places}
    alike = _alike(inputs.loaded, inputs.pairs)
    for positive, negative in _read_pairs(inputs.loaded, inputs.row, inputs.places, alike):
        for place in inputs.places:
            differences[place].width = middles[place].width = positive[place].shape[-1]
            differences[place].update(positive[place] - negative[place])
            middles[place].update((positive[place] + negative[place]) / 2)
    subspaces = []
    for place in inputs.places:
        if not differences[place].count:
            raise RequestError(
                "no contrast pair has members of one length in tokens, and only those are compared position by"
                " position; choose another source of directions or mend the pairs"
            )
        subspaces.append(
            principal_components(differences[place], inputs.count, place, centred=False, offset=middles[place].mean)
        )
    counted = {"pairs": len(alike), PAIRS_LEFT_OUT: len(inputs.pairs) - len(alike)}
    return tuple(subspace.with_provenance(counted) for subspace in subspaces)


def _alike(loaded: LoadedModel, pairs: Sequence[ContrastPair]) -> list[tuple[Row, Row]]:
    """Pairs whose members differ and have as many tokens; only those can be compared position by position."""
    encoded = [(encode(loaded.tokenizer, p.positive, True), encode(loaded.tokenizer, p.negative, True)) for p in pairs]
    return [(a, b) for a, b in encoded if len(a) == len(b) and a != b]


def _read_pairs(
    loaded: LoadedModel, row: Architecture, places: Sequence[Place], pairs: Sequence[tuple[Row, Row]]
) -> Iterator[tuple[Mapping[Place, Tensor], Mapping[Place, Tensor]]]:
    """Both members' activations from where the pair has begun to differ."""
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        values = activations(loaded.model, row, [ids for pair in part for ids in pair], places)
        for number, (positive, negative) in enumerate(part):
            # Before the first difference both members have the same states.
            first = next(i for i, (a, b) in enumerate(zip(positive, negative, strict=True)) if a != b)
            apart = slice(first, len(positive))
            plus, minus = ({place: values[place][2 * number + side, apart] for place in places} for side in (0, 1))
            yield plus, minus


def _by_class(fitter: Callable[[Moments, Moments, Place], Subspace]) -> Source:
    """A fitter of two classes on the last token of each member of the pairs."""

    def source(inputs: SourceInputs) -> Found:
        moments: dict[tuple[Place, str], Moments] = {}
        for name, texts in (
            ("plus", [p.positive for p in inputs.pairs]),
            ("minus", [p.negative for p in inputs.pairs]),
        ):
            rows = [encode(inputs.loaded.tokenizer, text, True) for text in texts]
            for start in range(0, len(rows), BATCH):
                part = rows[start : start + BATCH]
                values = activations(inputs.loaded.model, inputs.row, part, inputs.places)
                for place in inputs.places:
                    last = torch.stack([values[place][i, len(ids) - 1] for i, ids in enumerate(part)])
                    moments.setdefault((place, name), Moments(last.shape[-1], covariance=True)).update(last)
        return tuple(fitter(moments[place, "plus"], moments[place, "minus"], place) for place in inputs.places)

    return source


def _finetuned(inputs: SourceInputs) -> Found:
    """Components of what the fine-tune changed, centred over tokens as in the paper."""
    assert inputs.tuned is not None, "the plain fine-tune was trained for this"
    subspaces = []
    for place in inputs.places:
        difference = inputs.tuned.rows[place] - inputs.base.rows[place]
        if not bool(difference.any()):
            raise RequestError(f"fine-tuning changed nothing at the {place}; look at later layers, or at outputs")
        moments = Moments(difference.shape[-1], covariance=True)
        moments.update(difference)
        offset = inputs.base.rows[place].double().mean(0)
        subspaces.append(replace(principal_components(moments, inputs.count, place, offset=offset), source="finetuned"))
    return tuple(subspaces)


SOURCES: dict[str, Source] = {
    "pairs": _pairs,
    "difference_in_means": _by_class(mean_difference),
    "mass_mean": _by_class(mass_mean),
    "linear_probe": _by_class(ridge_probe),
    "leace": _by_class(least_squares_eraser),
    "finetuned": _finetuned,
}
