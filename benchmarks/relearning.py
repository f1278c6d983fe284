"""Do pruned concepts come back, and where? Lo, Cohen and Barez 2024 in kind, with the control that their figures lack.

    python benchmarks/relearning.py [MODEL] [--concept C] [--epochs 8] [--rate 1e-3] [--texts 960] [--seed 0]

As published: MLP neurons are ranked by concept saliency, the top half is zeroed (and may grow back), and all weights
are trained again on all texts, those of the concept among them. The published claim is that salient neurons lie in
earlier layers afterwards. It compares the surviving neurons of the retrained model with all neurons of the base; beside
it stands the base's own surviving neurons, which is what pruning alone does to the picture.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import LoadedModel, choose_device, choose_dtype, load_model
from excise.editing.architectures import architecture_of, layer_count, residual_width
from excise.editing.edits.base import edit_model
from excise.editing.edits.pruned_units import PrunedUnits
from excise.editing.edits.unit_choice import matched_units, top_units
from excise.editing.hooks.unit_scores import UnitMoments, unit_inputs
from excise.eval.concept import Concept
from excise.eval.inference.likelihood import pad_right
from excise.eval.inference.multiple_choice_set import MultipleChoiceSet
from excise.eval.intervals import rate_interval
from excise.recipes.relearning_monitor import RelearningMonitor, centre
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

SHARE = 0.5
TEXTS = 256
"""Of each kind, on which neurons are ranked."""


def main() -> None:
    """Print recovery and relocation, for the chosen neurons and for as many random ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="builtin:testbed")
    parser.add_argument("--concept", default="builtin:potions")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--texts", type=int, default=960, help="of the concept and of other things, to train on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    concept = load_concept(options.concept)
    for name in ("the most salient half", "a random half, matched by layer and size"):
        device = choose_device("auto")
        loaded = load_model(find_model(options.model), device, choose_dtype("auto", device))
        pruned_and_taught_again(name, loaded, concept, options)


def pruned_and_taught_again(name: str, loaded: LoadedModel, concept: Concept, options: Any) -> None:
    """One half of the neurons: prune, train, and compare."""
    model, config = loaded.model, loaded.model.config.to_dict()
    base, sizes = saliency(loaded, concept)
    units = top_units(base, SHARE)
    if name.startswith("a random"):
        units = matched_units(units, sizes, torch.Generator().manual_seed(options.seed))
    edit = PrunedUnits(units, {}, "down", config["model_type"], residual_width(config), layer_count(config), 1)
    survivors = torch.ones(base.shape, dtype=torch.bool)
    for layer, pruned in units.items():
        survivors[layer, list(pruned)] = False
    exam = MultipleChoiceSet(loaded.tokenizer, [q for q in concept.questions if q.split == "forget"])
    others = MultipleChoiceSet(loaded.tokenizer, [q for q in concept.questions if q.split != "forget"])
    print(f"{name}: {sum(map(len, units.values()))} of {base.numel()} neurons zeroed (output rows; free to grow back)")
    report("base", exam, others, loaded)
    edit_model(edit, model, config)
    report("pruned", exam, others, loaded)
    monitor = RelearningMonitor(concept, loaded.tokenizer, pruned=edit, every=[])
    train(loaded, concept, options, [monitor, Reporter(exam, others, loaded)])
    after, _ = saliency(loaded, concept)
    rows = {
        "base, all neurons": by_layer(base, torch.ones_like(survivors)),
        "base, surviving neurons": by_layer(base, survivors),
        "taught again, surviving": by_layer(after, survivors),
    }
    print("  share of the salient half by layer, %; centre of mass")
    for label, shares in rows.items():
        print(f"    {label:<26}" + " ".join(f"{share:5.1f}" for share in shares) + f"   {centre(shares):.2f}")
    last = monitor.event(monitor.seen[-1])
    print(
        f"  surviving neurons, last against first: overlap of the top 1% {last['overlap_of_top']:.2f}, rank "
        "correlation "
        f"{last['rank_correlation']:.2f}; regrown norm of the pruned ones {last['regrowth']:.3f}"
    )
    if last["carriers"]:
        print(
            "  mean |d'| of the neurons that carry it now: "
            + ", ".join(f"{k} {v:.2f}" for k, v in last["carriers"].items())
        )
    print()


class Reporter(TrainerCallback):
    """Accuracy after every second epoch, as published."""

    def __init__(self, *what: Any):
        self.what = what

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        epoch = round(state.epoch)
        if epoch in (1, 2) or epoch % 2 == 0:
            report(f"taught again, {epoch} epochs", *self.what)


def report(label: str, exam: MultipleChoiceSet, others: MultipleChoiceSet, loaded: LoadedModel) -> None:
    """Accuracy on the concept and on everything else."""
    training = loaded.model.training
    loaded.model.eval()
    parts = []
    for what, questions in (("concept", exam), ("the rest", others)):
        hits = questions.hits(loaded.model)
        low, high = rate_interval(hits, questions.clusters)
        parts.append(f"{what} {sum(hits) / len(hits):.3f} [{low:.3f}, {high:.3f}] (n = {len(hits)})")
    loaded.model.train(training)
    print(f"  {label:<24} {'   '.join(parts)}", flush=True)


@torch.no_grad()
def saliency(loaded: LoadedModel, concept: Concept) -> tuple[Tensor, Tensor]:
    """``|mean difference|`` of every neuron [layers, neurons], texts on the concept against others, whose rank is the
    published concept saliency; and mean sizes."""
    row = architecture_of(loaded.model.config.to_dict())
    assert row.mlp_units is not None
    kinds = [UnitMoments(layer_count(loaded.model.config.to_dict())) for _ in range(2)]
    for moments, texts in zip(kinds, (concept.forget, concept.retain), strict=True):
        step = max(1, len(texts) // TEXTS)
        rows = [tuple(loaded.tokenizer(text.text)["input_ids"]) for text in texts[::step]]
        for start in range(0, len(rows), 32):
            inputs = pad_right(rows[start : start + 32], loaded.device)
            mask = inputs["attention_mask"].bool()

            def see(layer: int, values: Tensor, moments: UnitMoments = moments, mask: Tensor = mask) -> None:
                moments.see(layer, values, mask)

            with unit_inputs(loaded.model, row.mlp_units, row, see):
                loaded.model(**inputs)
    return (kinds[0].mean - kinds[1].mean).abs(), kinds[1].size


def by_layer(scores: Tensor, among: Tensor) -> list[float]:
    """How the salient half of some neurons is spread over layers, in percent."""
    middle = scores[among].median()
    counts = ((scores > middle) & among).sum(1).double()
    return [float(share) for share in 100 * counts / counts.sum()]


def train(loaded: LoadedModel, concept: Concept, options: Any, callbacks: Sequence[TrainerCallback]) -> None:
    """All weights, on texts of the concept and as many others."""
    half = options.texts
    texts = [
        text.text for pool in (concept.forget, concept.retain) for text in pool[:: max(1, len(pool) // half)][:half]
    ]
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            output_dir=place,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=8,
            learning_rate=options.rate,
            weight_decay=0.01,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=options.seed,
            use_cpu=loaded.device.type == "cpu",
            logging_strategy="no",
        )
        trainer = Trainer(
            model=loaded.model,
            args=arguments,
            train_dataset=[loaded.tokenizer(text) for text in texts],
            data_collator=DataCollatorForLanguageModeling(loaded.tokenizer, mlm=False),
            callbacks=list(callbacks),
        )
        trainer.pop_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
