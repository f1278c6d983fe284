"""Scoring the units of one model: how much each matters to what is to be forgotten and to what is to be retained."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...artifacts.events import Events, Stage
from ...artifacts.models.load import LoadedModel
from ...editing.edits.pruned_units import no_units
from ...editing.edits.unit_choice import UnitScores
from ...editing.errors import RequestError
from ...editing.hooks.unit_scores import (
    UnitAttribution,
    UnitMoments,
    gradients_reach_units,
    mean_difference,
    rank_correlation,
    rank_saliency,
    selectivity,
    unit_inputs,
)
from ...editing.wiring.row import Architecture
from ..common.examples import Example, example_batch, scored_nats
from ..common.memory_plan import rows_at_once
from ..common.memory_sizes import Rows

BATCH = 32
VALIDATED_ON = 64
"""Forget sequences on which units are removed one by one."""
FORMULAS = {"mean_difference": mean_difference, "selectivity": selectivity, "saliency": rank_saliency}
"""Scores that need the units' moments alone."""


@dataclass
class _Seen:
    """What was seen of all units of one kind on some sequences."""

    moments: UnitMoments
    attribution: UnitAttribution
    tokens: int = 0

    def see(self, mask: Tensor, layer: int, values: Tensor) -> None:
        """Take in the activations of one layer."""
        self.moments.see(layer, values, mask)
        self.attribution.see(layer, values)


@dataclass(frozen=True)
class UnitScorer:
    """Scores the units of a loaded model on sequences."""

    loaded: LoadedModel
    row: Architecture
    forget: list[Example]
    retain: list[Example]
    events: Events

    def scores(self, score: str, most: int) -> tuple[UnitScores | None, UnitScores | None]:
        """Scores of neurons and of the columns of heads; None where not every layer has them in the same module.

        Args:
            most: Sequences of each kind to read, at most, evenly spread.

        Raises:
            RequestError: The model has neither.
        """
        kinds = (self.row.mlp_units, self.row.attention_units)
        if kinds == (None, None):
            raise RequestError(
                f"the model has no units to prune: {no_units('neurons')}, and {no_units('heads')}; use another recipe"
            )
        seen = {}
        for name, examples in (("forget", self.forget), ("retain", self.retain)):
            chosen = examples[:: max(1, len(examples) // most)]
            with self.events.stage(f"score units on what to {name}", len(chosen)) as stage:
                seen[name] = self._read(chosen, stage)
        neurons, heads = (
            None if module is None else _scores_of(score, forget, retain)
            for module, forget, retain in zip(kinds, seen["forget"], seen["retain"], strict=True)
        )
        return neurons, heads

    def validate(self, neurons: UnitScores, combined: Tensor, count: int) -> dict[str, Any]:
        """Remove neurons one by one, of all ranks, and compare what that does to the loss with their scores.

        Args:
            combined: The scores by which neurons are ranked [layers, units].
            count: How many to remove; half of them have the highest scores.
        """
        order, half = combined.flatten().argsort(descending=True), count // 2
        others = torch.linspace(half, len(order) - 1, count - half).long()
        units = torch.cat([order[:half], order[others]]).tolist()
        with self.events.stage("remove units one by one", len(units)) as stage:
            untouched = self._loss_without(None)
            effects = []
            for unit in units:
                effects.append(self._loss_without((unit // combined.shape[1], unit % combined.shape[1])) - untouched)
                stage.advance()
        # The loss is that of forget sequences, so it is compared with that part of the score.
        expected = neurons.forget.flatten()[units].tolist()
        return {"units": len(units), "spearman": rank_correlation(torch.tensor(expected), torch.tensor(effects))}

    def _read(self, examples: list[Example], stage: Stage) -> tuple[_Seen, _Seen]:
        """One pass, forward and backward, over sequences; the loss is the log-odds against each sequence's answer."""
        model, row = self.loaded.model, self.row
        layers = len(model.get_submodule(row.layers))
        longest = Rows(BATCH, max(len(example.ids) for example in examples))
        size = rows_at_once(model.config.to_dict(), model.dtype, self.loaded.device, longest)
        neurons, heads = (_Seen(UnitMoments(layers), UnitAttribution(layers)) for _ in range(2))
        with gradients_reach_units(model):
            for start in range(0, len(examples), size):
                part = examples[start : start + size]
                batch = {key: value.to(self.loaded.device) for key, value in example_batch(part).items()}
                mask = batch["attention_mask"].bool()
                with ExitStack() as hooks:
                    for module, kind in ((row.mlp_units, neurons), (row.attention_units, heads)):
                        if module is not None:
                            hooks.enter_context(unit_inputs(model, module, row, partial(kind.see, mask)))
                    nats = scored_nats(model, batch)
                _log_odds_against(nats).sum().backward()
                for seen in (neurons, heads):
                    seen.tokens += len(nats)
                stage.advance(len(part))
        return neurons, heads

    @torch.no_grad()
    def _loss_without(self, unit: tuple[int, int] | None) -> float:
        """Mean log-odds against the answers, with one neuron of one layer silenced."""
        assert self.row.mlp_units is not None
        examples = example_batch(self.forget[:VALIDATED_ON])
        batch = {key: value.to(self.loaded.device) for key, value in examples.items()}

        def silence(layer: int, values: Tensor) -> None:
            if unit and layer == unit[0]:
                # In place, because the hooks of ``unit_inputs`` return nothing.
                values[..., unit[1]] = 0

        with unit_inputs(self.loaded.model, self.row.mlp_units, self.row, silence):
            return float(_log_odds_against(scored_nats(self.loaded.model, batch)).mean())


def _scores_of(score: str, forget: _Seen, retain: _Seen) -> UnitScores:
    size, mean = retain.moments.size, retain.moments.mean
    if score in ("attribution", "mean_attribution"):
        effects = [
            seen.attribution.effect(seen.moments.mean if score == "mean_attribution" else None) / seen.tokens
            for seen in (forget, retain)
        ]
        # On retain sequences a change either way is damage.
        return UnitScores(effects[0], effects[1].abs(), size, mean)
    scores = FORMULAS[score](forget.moments, retain.moments)
    if score == "mean_difference":
        scores = scores.abs()
    # These scores compare both kinds of sequences already, so nothing is left to subtract.
    return UnitScores(scores, torch.zeros_like(scores), size, mean)


def _log_odds_against(nats: Tensor) -> Tensor:
    """``-log(p / (1 - p))``: where the model is certain, the gradient of ``-log p`` says nothing any more."""
    return nats + torch.log(-torch.expm1(-nats.clamp_min(1e-6)))
