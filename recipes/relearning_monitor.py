"""Watching a concept come back while a model trains: a callback for any ``transformers.Trainer``.

    from excise.recipes.monitor import RelearningMonitor
    trainer.add_callback(RelearningMonitor("builtin:potions", tokenizer, out="watched"))

At log-spaced steps it asks the concept's questions of group V and measures every MLP neuron's effect size between texts
on the concept and others. Effect sizes are absolute, so that a concept which grows weaker everywhere is seen to; ranks
alone cannot show that (Lo et al. 2024 as implemented). Where the concept sits is always compared with the same units
before training: without that control, pruning itself looks like relocation.
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
from ..editing.architectures import Architecture, architecture_of
from ..editing.edits.pruned_units import PrunedUnits, ZeroedTensor
from ..editing.errors import RequestError
from ..editing.hooks.unit_scores import UnitMoments, mean_difference, rank_correlation, unit_inputs
from ..editing.modules import causal_model, final_hidden
from ..eval.concept import Concept
from ..eval.inference.likelihood import pad_right
from ..eval.inference.multiple_choice_set import MultipleChoiceSet
from ..eval.statistics import wilson

TEXTS = 64
"""Texts of each kind whose activations are read."""
QUESTIONS = 40
"""Questions of each split, at most."""
TOP = 0.01
"""Share of units whose overlap is followed."""
TRACKED = 16
"""Pruned units, and as many successors, whose tokens are compared."""
TOKENS = 5


@dataclass(frozen=True)
class Seen:
    """What was seen at one step; the same keys as an event."""

    step: int
    accuracy: dict[str, Any]
    """Of group V: value, n, ci95."""
    cloze: float
    """Mean log-probability of the true answers, nats."""
    utility: float
    """Accuracy on everything else."""
    effect: Float[Tensor, "layers units"] = field(repr=False)
    """d' of each neuron, concept against the rest."""
    other: Float[Tensor, "layers units"] | None = field(repr=False)
    """d' of each neuron, the pack's neighbour against the rest: what units may have been there for before."""
    regrowth: float
    """Norm of what pruned units write, over that of all units."""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    """Tokens on which followed units are most active."""

    def mass(self, kept: Tensor) -> list[float]:
        """Mean squared d' of each layer's units that are kept."""
        return [
            float(row[keep].square().mean()) if keep.any() else 0.0 for row, keep in zip(self.effect, kept, strict=True)
        ]


class RelearningMonitor(TrainerCallback):
    """Records recovery, where a concept sits and what grows back, and leaves the training as it was.

    Args:
        concept: A pack by reference, or a loaded one.
        tokenizer: Of the model that is trained.
        pruned: A prune run, its checkpoint or its edit, whose units are followed.
        out: Folder for ``monitor.jsonl`` and plots; nothing is written without one.
        every: Steps at which to look; powers of two by default.
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
        asked = [q for q in self.concept.questions if q.split == "forget" and q.group == "V"]
        others = [q for q in self.concept.questions if q.split != "forget"]
        if not asked:
            raise RequestError(f"concept {self.concept.ref} has no forget questions of group V to watch")
        rng = random.Random("excise monitor")
        self.exam = MultipleChoiceSet(tokenizer, rng.sample(asked, k=min(questions, len(asked))))
        self.control = (
            MultipleChoiceSet(tokenizer, rng.sample(others, k=min(questions, len(others)))) if others else None
        )
        pools = [text.text for text in self.concept.forget], [text.text for text in self.concept.retain]
        # Told alike, so that a unit which tells them apart tells subjects, not forms.
        told = [
            [f"{q.prompt} {q.choices[q.answer]}" for q in others if (q.split == "neighbour") == near]
            for near in (True, False)
        ]
        self.rows = [
            # Rows of like length stand together, so that little is padding.
            sorted(
                (tuple(tokenizer(text)["input_ids"][:128]) for text in rng.sample(pool, k=min(texts, len(pool)))),
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
        """Measure now; mode, random states and gradients are left as they were.

        Args:
            neighbours: Also read what units are for among the neighbours; a training does so before and after.
        """
        inner = causal_model(model)
        row = architecture_of(inner.config.to_dict())
        if row.mlp_units is None:
            raise RequestError("the experts of this model are fused into one tensor, which has no neurons to watch")
        with _undisturbed(model), torch.no_grad():
            hits, answered = self.exam.hits_and_probabilities(inner)
            answers = np.log(np.maximum(answered, 1e-30))
            utility = self.control.hits(inner) if self.control else (float("nan"),)
            (effect, *others), tokens = self._effects(inner, row, self.rows if neighbours else self.rows[:2])
            found = Seen(
                step,
                {"value": sum(hits) / len(hits), "n": len(hits), "ci95": wilson(int(sum(hits)), len(hits))},
                float(answers.mean()),
                sum(utility) / len(utility),
                effect,
                others[0] if others else None,
                self._regrowth(inner, row),
                tokens,
            )
        self.seen.append(found)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "monitor.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.event(found)) + "\n")
        return found

    def event(self, seen: Seen) -> dict[str, Any]:
        """One look, beside the first: what changed, and against which control."""
        first, kept = self.seen[0], self._kept(seen.effect)
        now, then = seen.effect.abs().flatten(), first.effect.abs().flatten()
        inside = kept.flatten()
        return {
            "step": seen.step,
            "accuracy": seen.accuracy,
            "cloze": seen.cloze,
            "utility": seen.utility,
            "mass_by_layer": seen.mass(kept),
            "centre_of_mass": centre(seen.mass(kept)),
            # The same surviving units before training: what pruning alone did to the picture.
            "centre_of_mass_before": centre(first.mass(kept)),
            "regrowth": seen.regrowth,
            "overlap_of_top": overlap(now[inside], then[inside]),
            "rank_correlation": rank_correlation(now[inside], then[inside]),
            "similarity_of_tokens": self._similarity(seen),
            "carriers": self._carriers(seen, inside),
        }

    def _carriers(self, seen: Seen, inside: Tensor) -> dict[str, float] | None:
        """Mean size of d' of the units that carry the concept now, toward it and toward its neighbour, now and before.

        Polysemantic units keep the neighbour's while they gain the concept's.
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
        """Write ``recovery.png``: accuracy, and where the concept sits, layer by step."""
        figure = charts.watched([self.event(seen) for seen in self.seen], self.exam.chance)
        out.mkdir(parents=True, exist_ok=True)
        (out / "recovery.png").write_bytes(charts.png(figure))

    def _effects(
        self, model: Any, row: Architecture, kinds: Sequence[Sequence[tuple[int, ...]]]
    ) -> tuple[list[Tensor], dict[str, list[int]]]:
        """d' of each neuron for the concept, and for its neighbour where there is one; the tokens of those that are followed."""
        assert row.mlp_units is not None
        layers = len(model.get_submodule(row.layers))
        moments = [UnitMoments(layers) for _ in kinds]
        followed = self._followed()
        sums = {unit: torch.zeros(int(model.config.vocab_size), dtype=torch.float64) for unit in followed}
        counts = torch.zeros(int(model.config.vocab_size), dtype=torch.float64)
        for kind, rows in enumerate(kinds):
            for start in range(0, len(rows), 32):
                inputs = pad_right(rows[start : start + 32], model.device)
                mask = inputs["attention_mask"].bool()
                ids = inputs["input_ids"][mask].cpu()
                # Tokens are looked at in the pack's texts.
                looked_at = sums if kind < 2 else {}
                if looked_at:
                    counts.index_add_(0, ids, torch.ones(len(ids), dtype=torch.float64))

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
                            sums[unit].index_add_(0, ids, values[..., unit[1]][mask].double().cpu())

                with unit_inputs(model, row.mlp_units, row, see):
                    final_hidden(model, inputs)
        effects = [
            mean_difference(one, rest).float().cpu() for one, rest in zip(moments[::2], moments[1::2], strict=True)
        ]
        seen = counts > 0
        tokens = {
            f"{layer}.{unit}": torch.where(seen, total / counts.clamp_min(1), -torch.inf).topk(TOKENS).indices.tolist()
            for (layer, unit), total in sums.items()
        }
        return effects, tokens

    def _followed(self) -> list[tuple[int, int]]:
        """Pruned units, and the survivors that were strongest at the first look."""
        gone = (
            [(layer, unit) for layer, units in self.pruned.neurons.items() for unit in units][:TRACKED]
            if self.pruned
            else []
        )
        if not self.seen:
            return gone
        first = self.seen[0].effect.abs() * self._kept(self.seen[0].effect)
        strongest = first.flatten().topk(min(TRACKED, first.numel())).indices.tolist()
        return [*gone, *((place // first.shape[1], place % first.shape[1]) for place in strongest)]

    def _kept(self, effect: Tensor) -> Tensor:
        """Units that were not pruned."""
        kept = torch.ones(effect.shape, dtype=torch.bool)
        for layer, units in self.pruned.neurons.items() if self.pruned else ():
            kept[layer, list(units)] = False
        return kept

    def _regrowth(self, model: Any, row: Architecture) -> float:
        if self.pruned is None:
            return 0.0
        parameters = dict(model.named_parameters())
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
        """Mean overlap of the tokens that followed units answer to, now and when first seen (Jaccard)."""
        shares = []
        for unit, tokens in seen.tokens.items():
            before = next((one.tokens[unit] for one in self.seen if unit in one.tokens), tokens)
            shares.append(len(set(tokens) & set(before)) / len(set(tokens) | set(before)))
        return sum(shares) / len(shares) if shares else None


def centre(mass: Sequence[float]) -> float:
    """Mean layer, weighted by mass."""
    total = sum(mass)
    return sum(layer * value for layer, value in enumerate(mass)) / total if total else 0.0


def overlap(one: Tensor, other: Tensor, share: float = TOP) -> float:
    """Share of the top units of one that are among the top units of the other."""
    count = max(1, int(share * len(one)))
    tops = [set(values.topk(count).indices.tolist()) for values in (one, other)]
    return len(tops[0] & tops[1]) / count


def _pruned(given: str | Path | PrunedUnits | None) -> PrunedUnits | None:
    if given is None or isinstance(given, PrunedUnits):
        return given
    place = Path(given)
    for folder in (place / "checkpoint" / "excise", place / "excise", place):
        if (folder / "edit.json").exists():
            edit = load_edit(folder)
            if not isinstance(edit, PrunedUnits):
                raise RequestError(f"{given} holds a {edit.method} edit; give a prune run")
            return edit
    raise RequestError(f"{given} holds no edit; give a prune run, its checkpoint or its edit folder")


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode, with every module's mode and all random states put back."""
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
