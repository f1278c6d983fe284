"""Watch a concept being relearned while a model trains: a callback for any ``transformers.Trainer``.

    from excise.recipes.relearning_monitor import RelearningMonitor
    trainer.add_callback(RelearningMonitor("builtin:potions", tokenizer, out="watched"))

At steps 1, 2, 4, 8 and so on it asks the concept's questions of group V, and measures the effect size of every MLP
neuron between texts on the concept and other texts. Effect sizes are absolute, so they show a concept that becomes
weaker in all layers; ranks alone cannot show that (Lo et al. 2024, as in their code). The layers that carry the concept
are always compared with the same units before training. Without this control, pruning itself would look like
relocation.
"""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback

from ..artifacts.checkpoints.edits import load_edit
from ..artifacts.concepts import load_concept
from ..artifacts.reporting import charts
from ..editing.architectures import architecture_of
from ..editing.edits.pruned_units import PrunedUnits, ZeroedTensor, no_units
from ..editing.errors import RequestError
from ..editing.hooks.unit_scores import UnitMoments, mean_difference, rank_correlation, unit_inputs
from ..editing.modules import causal_model, final_hidden, language_config
from ..editing.wiring.row import Architecture
from ..eval.concept import Concept, Question
from ..eval.inference.likelihood import pad_right
from ..eval.inference.multiple_choice_set import MultipleChoiceSet
from ..eval.intervals import rate_interval
from ..eval.items import unseen
from .common.tokens import encode

TEXTS = 64
"""Texts of each kind whose activations are measured."""
QUESTIONS = 40
"""Questions of each split, at most."""
TOP = 0.01
"""Share of units that count as the top, for overlaps."""
TRACKED = 16
"""Number of pruned units, and of the strongest surviving ones, whose tokens are compared."""
TOKENS = 5
"""Tokens recorded for each of these units."""


@dataclass(frozen=True)
class Seen:
    """The measurements of one step; an event has the same keys."""

    step: int
    accuracy: dict[str, Any]
    """Accuracy on forget questions of group V: value, n, ci95."""
    cloze: float
    """Mean log-probability of the true answers, in nats."""
    utility: float
    """Accuracy on all other questions."""
    effect: Float[Tensor, "layers units"] = field(repr=False)
    """d' of each neuron between texts on the concept and other texts."""
    other: Float[Tensor, "layers units"] | None = field(repr=False)
    """d' of each neuron between the pack's neighbour topic and other topics: what a unit may have served before."""
    regrowth: float
    """Norm of the pruned units' weights, divided by that of all units' weights."""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    """Tokens on which the tracked units are most active."""

    def mass(self, surviving: Tensor) -> list[float]:
        """Mean squared d' of each layer's units in the mask ``surviving`` [layers, units]."""
        return [
            float(row[keep].square().mean()) if keep.any() else 0.0
            for row, keep in zip(self.effect, surviving, strict=True)
        ]


class RelearningMonitor(TrainerCallback):
    """Records how much of a concept is relearned, in which layers, and whether pruned units grow back.

    The monitor does not change the training: it restores modes, random states and gradients.

    Args:
        concept: A concept pack: a reference, or a loaded one.
        tokenizer: Tokenizer of the model that is trained.
        pruned: A prune run, its checkpoint or its edit, whose units are tracked.
        out: Folder for ``monitor.jsonl`` and the plot; by default nothing is written.
        every: Steps at which to measure; powers of two by default.
        questions: Questions of each split, at most.
        texts: Texts of each kind, at most.

    Raises:
        RequestError: The concept has no forget questions of group V, or neither texts nor questions on anything else.
    """

    def __init__(
        self,
        concept: str | Concept,
        tokenizer: Any,
        *,
        pruned: str | Path | PrunedUnits | None = None,
        out: str | Path | None = None,
        every: Sequence[int] | None = None,
        questions: int = QUESTIONS,
        texts: int = TEXTS,
    ):
        self.concept = load_concept(concept) if isinstance(concept, str) else concept
        self.tokenizer, self.every, self.out = tokenizer, every, None if out is None else Path(out)
        self.pruned = _pruned(pruned)
        self.seen: list[Seen] = []
        forget_questions = [q for q in self.concept.questions if q.split == "forget" and q.group == "V"]
        others = [q for q in self.concept.questions if q.split != "forget"]
        if not forget_questions:
            raise RequestError(
                f"concept {self.concept.ref} has no forget questions of group V, so relearning cannot be measured; add "
                "some"
            )
        apart = unseen(others)
        rng = random.Random("excise monitor")
        self.exam = MultipleChoiceSet(tokenizer, rng.sample(forget_questions, k=min(questions, len(forget_questions))))
        self.control = MultipleChoiceSet(tokenizer, rng.sample(apart, k=min(questions, len(apart)))) if apart else None
        # A pack of questions alone has no texts to compare, so its questions with their answers are read.
        pools = (
            [text.text for text in self.concept.forget] or _told(forget_questions),
            [text.text for text in self.concept.retain] or _told(others),
        )
        if not pools[1]:
            raise RequestError(
                f"concept {self.concept.ref} has neither retain texts nor questions on anything else, so nothing can be"
                " compared with its own; add retain.jsonl"
            )
        # Neighbour and other topics in the same form, so that units that separate them separate topics, not forms.
        told = [_told([q for q in others if (q.split == "neighbour") == near]) for near in (True, False)]
        self.rows = [
            # Sorted by length, so that batches have little padding.
            sorted(
                (encode(tokenizer, text, True)[:128] for text in rng.sample(pool, k=min(texts, len(pool)))),
                key=len,
            )
            for pool in (*pools, *(told if all(told) else ()))
        ]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.look(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step = state.global_step
        wanted = step in self.every if self.every is not None else step & (step - 1) == 0
        if wanted or step == state.max_steps:
            self.look(model, step, neighbours=step == state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.out is not None:
            self.plot(self.out)

    def look(self, model: Any, step: int, *, neighbours: bool = True) -> Seen:
        """Measure the model now; modes, random states and gradients are restored.

        Args:
            model: The model in training, with an adapter or without.
            step: The training step, for the record.
            neighbours: Also measure the neighbour topic; by default training does so at its first and last step.

        Raises:
            RequestError: The model's experts are fused, so it has no neurons to measure.
        """
        inner = causal_model(model)
        row = architecture_of(inner.config.to_dict())
        if row.mlp_units is None:
            raise RequestError(f"the model has no neurons to measure: {no_units('neurons')}; use a dense model")
        with _undisturbed(model), torch.no_grad():
            hits, answered = self.exam.hits_and_probabilities(inner)
            # A logarithm of 0 would make the mean infinite.
            answers = np.log(np.maximum(answered, 1e-30))
            utility = self.control.hits(inner) if self.control else (float("nan"),)
            (effect, *others), tokens = self._effects(inner, row, self.rows if neighbours else self.rows[:2])
            seen = Seen(
                step,
                {"value": sum(hits) / len(hits), "n": len(hits), "ci95": rate_interval(hits, self.exam.clusters)},
                float(answers.mean()),
                sum(utility) / len(utility),
                effect,
                others[0] if others else None,
                self._regrowth(inner, row),
                tokens,
            )
        self.seen.append(seen)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "monitor.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.event(seen)) + "\n")
        return seen

    def event(self, seen: Seen) -> dict[str, Any]:
        """The record of one measurement, compared with the first one."""
        first, surviving = self.seen[0], self._surviving(seen.effect)
        now, then = seen.effect.abs().flatten(), first.effect.abs().flatten()
        inside = surviving.flatten()
        return {
            "step": seen.step,
            "accuracy": seen.accuracy,
            "cloze": seen.cloze,
            "utility": seen.utility,
            "mass_by_layer": seen.mass(surviving),
            "centre_of_mass": centre(seen.mass(surviving)),
            # The same surviving units before training show the effect of pruning alone.
            "centre_of_mass_before": centre(first.mass(surviving)),
            "regrowth": seen.regrowth,
            "overlap_of_top": overlap(now[inside], then[inside]),
            "rank_correlation": rank_correlation(now[inside], then[inside]),
            "similarity_of_tokens": self._similarity(seen),
            "carriers": self._carriers(seen, inside),
        }

    def _carriers(self, seen: Seen, inside: Tensor) -> dict[str, float] | None:
        """Mean |d'| of the units with the largest effects now: for the concept and its neighbour, now and before.

        In polysemantic units, the effect of the concept grows while that of the neighbour stays.
        """
        first = self.seen[0]
        if seen.other is None or first.other is None:
            return None
        values = {
            "concept": seen.effect,
            "concept_before": first.effect,
            "neighbour": seen.other,
            "neighbour_before": first.other,
        }
        flat = {name: effect.abs().flatten()[inside] for name, effect in values.items()}
        top = flat["concept"].topk(max(1, int(TOP * len(flat["concept"])))).indices
        return {name: float(effect[top].mean()) for name, effect in flat.items()}

    def plot(self, out: Path) -> None:
        """Write ``recovery.png``: accuracy, and the concept's effect by layer and step."""
        figure = charts.watched([self.event(seen) for seen in self.seen], self.exam.chance)
        out.mkdir(parents=True, exist_ok=True)
        (out / "recovery.png").write_bytes(charts.png(figure))

    def _effects(
        self, model: Any, row: Architecture, kinds: Sequence[Sequence[tuple[int, ...]]]
    ) -> tuple[list[Tensor], dict[str, list[int]]]:
        """d' of each neuron for the concept, and for its neighbour if there is one; top tokens of the tracked units."""
        assert row.mlp_units is not None
        layers = len(model.get_submodule(row.layers))
        moments = [UnitMoments(layers) for _ in kinds]
        followed = self._followed()
        sums = {unit: torch.zeros(int(language_config(model).vocab_size), dtype=torch.float64) for unit in followed}
        counts = torch.zeros(int(language_config(model).vocab_size), dtype=torch.float64)
        for kind, rows in enumerate(kinds):
            for start in range(0, len(rows), 32):
                inputs = pad_right(rows[start : start + 32], model.device)
                mask = inputs["attention_mask"].bool()
                ids = inputs["input_ids"][mask].cpu()
                # Kinds 0 and 1 are the pack's texts; tokens are counted only there.
                looked_at = sums if kind < 2 else {}
                if looked_at:
                    counts.index_add_(0, ids, torch.ones(len(ids), dtype=torch.float64))

                # Defaults bind this batch's values; a closure would see those of the last one.
                def see(
                    layer: int,
                    values: Tensor,
                    kind: int = kind,
                    mask: Tensor = mask,
                    ids: Tensor = ids,
                    sums: dict[tuple[int, int], Tensor] = looked_at,
                ) -> None:
                    moments[kind].see(layer, values, mask)
                    for unit in sums:
                        if unit[0] == layer:
                            sums[unit].index_add_(0, ids, values[..., unit[1]][mask.to(values.device)].cpu().double())

                with unit_inputs(model, row.mlp_units, row, see):
                    final_hidden(model, inputs)
        effects = [
            mean_difference(topic, rest).float().cpu() for topic, rest in zip(moments[::2], moments[1::2], strict=True)
        ]
        seen = counts > 0
        tokens = {
            f"{layer}.{unit}": torch.where(seen, total / counts.clamp_min(1), -torch.inf).topk(TOKENS).indices.tolist()
            for (layer, unit), total in sums.items()
        }
        return effects, tokens

    def _followed(self) -> list[tuple[int, int]]:
        """The tracked units: pruned ones, and the surviving ones that were strongest at the first measurement."""
        pruned = (
            [(layer, unit) for layer, units in self.pruned.neurons.items() for unit in units][:TRACKED]
            if self.pruned
            else []
        )
        # Which units are strongest is known from the first measurement on.
        if not self.seen:
            return pruned
        first = self.seen[0].effect.abs() * self._surviving(self.seen[0].effect)
        strongest = first.flatten().topk(min(TRACKED, first.numel())).indices.tolist()
        return [*pruned, *((place // first.shape[1], place % first.shape[1]) for place in strongest)]

    def _surviving(self, effect: Tensor) -> Tensor:
        """Mask [layers, units] of the units that were not pruned."""
        surviving = torch.ones(effect.shape, dtype=torch.bool)
        for layer, units in self.pruned.neurons.items() if self.pruned else ():
            surviving[layer, list(units)] = False
        return surviving

    def _regrowth(self, model: Any, row: Architecture) -> float:
        if self.pruned is None:
            return 0.0
        parameters = dict(model.named_parameters())
        # peft puts base_layer into the names of modules that carry an adapter.
        names = [name.replace(".base_layer", "") for name in parameters]
        by_name = dict(zip(names, parameters.values(), strict=True))
        whole = part = 0.0
        for tensor in self.pruned.plan(model.config.to_dict(), names).tensors:
            if isinstance(tensor, ZeroedTensor) and by_name[tensor.name].dim() == 2:
                weight = by_name[tensor.name].detach().float()
                places = torch.tensor(tensor.units, device=weight.device)
                part += float(weight.index_select(tensor.axis, places).square().sum())
                whole += float(weight.square().sum())
        return (part / max(whole, 1e-30)) ** 0.5

    def _similarity(self, seen: Seen) -> float | None:
        """Mean Jaccard overlap of the tracked units' top tokens, now and at their first measurement."""
        shares = []
        for unit, tokens in seen.tokens.items():
            before = next((earlier.tokens[unit] for earlier in self.seen if unit in earlier.tokens), tokens)
            shares.append(len(set(tokens) & set(before)) / len(set(tokens) | set(before)))
        return sum(shares) / len(shares) if shares else None


def _told(questions: Sequence[Question]) -> list[str]:
    return [f"{q.prompt} {q.choices[q.answer]}" for q in questions]


def centre(mass: Sequence[float]) -> float:
    """Mean layer index, weighted by mass; 0 if there is no mass."""
    total = sum(mass)
    return sum(layer * value for layer, value in enumerate(mass)) / total if total else 0.0


def overlap(first: Tensor, second: Tensor, share: float = TOP) -> float:
    """Share of the top units of ``first`` that are also top units of ``second``, 0 to 1."""
    count = max(1, int(share * len(first)))
    tops = [set(values.topk(count).indices.tolist()) for values in (first, second)]
    return len(tops[0] & tops[1]) / count


def _pruned(source: str | Path | PrunedUnits | None) -> PrunedUnits | None:
    if source is None or isinstance(source, PrunedUnits):
        return source
    place = Path(source)
    for folder in (place / "checkpoint" / "excise", place / "excise", place):
        if (folder / "edit.json").exists():
            edit = load_edit(folder)
            if not isinstance(edit, PrunedUnits):
                raise RequestError(f"{source} holds a {edit.method} edit; give a prune run")
            return edit
    raise RequestError(f"{source} holds no edit; give a prune run, its checkpoint or its edit folder")


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Run the model in evaluation mode while the context lasts; restore every module's mode and all random states."""
    modes = [(module, module.training) for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    on_device = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if on_device:
            torch.cuda.set_rng_state_all(on_device)
