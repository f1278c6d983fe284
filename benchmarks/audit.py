"""Attackers side by side against one at a time, and what watching a training costs.

    python benchmarks/audit.py [MODEL] [--concept C] [--rounds 3]

Both parts do the same work twice in the same process, interleaved; ratios are paired.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import LoadedModel, choose_device, choose_dtype, load_model
from excise.eval.concept import Concept
from excise.recipes.audit import attackers
from excise.recipes.audit.attack_data import AttackData
from excise.recipes.audit.attackers import AttackTraining
from excise.recipes.audit.attacks.table import ATTACKS, BUDGETS
from excise.recipes.data.facts import find_facts
from excise.recipes.relearning_monitor import RelearningMonitor
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

ATTACKERS = 8
STEPS = 12
WATCHED_STEPS = 512


def main() -> None:
    """Print both ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="builtin:testbed")
    parser.add_argument("--concept", default="builtin:potions")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = choose_device("auto")
    loaded = load_model(find_model(options.model), device, choose_dtype("auto", device))
    concept = load_concept(options.concept)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        compare(
            f"{ATTACKERS} attackers, {STEPS} steps each, exams left out",
            "one at a time",
            "side by side",
            lambda: attack(loaded, concept, 1, work),
            lambda: attack(loaded, concept, 12, work),
            options.rounds,
        )
        compare(
            f"{WATCHED_STEPS} steps of a plain trainer",
            "watched",
            "unwatched",
            lambda: train(loaded, concept, work, watched=True),
            lambda: train(loaded, concept, work, watched=False),
            options.rounds,
        )


def compare(
    what: str, slow_name: str, fast_name: str, slow: Callable[[], float], fast: Callable[[], float], rounds: int
) -> None:
    """Time two ways in turn, after one round that does not count."""
    pairs = [(slow(), fast()) for _ in range(rounds + 1)][1:]
    ratios = sorted(a / b for a, b in pairs)
    middle = [statistics.median(values) for values in zip(*pairs, strict=True)]
    print(
        f"{what}: {slow_name} {middle[0]:.1f} s, {fast_name} {middle[1]:.1f} s, ratio {statistics.median(ratios):.2f} "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
    )


def attack(loaded: LoadedModel, concept: Concept, most: int, work: Path) -> float:
    """Seconds of the same attackers, so many at a time."""
    questions = [q for q in concept.questions if q.split == "forget" and q.group == "V"][:1]
    data = AttackData(concept, find_facts(concept), tuple(questions), loaded.tokenizer, seed=0)
    budget = dataclasses.replace(BUDGETS["quick"], steps=STEPS, seeds=ATTACKERS // 2, rates={"low_rank": (1e-3, 2e-3)})
    attackers.MOST_ATTACKERS = most
    started = time.perf_counter()
    with Events().stage("attack") as stage:
        AttackTraining(loaded.model, data, budget, work).curves({"rtt": ATTACKS["rtt"]}, stage)
    return time.perf_counter() - started


def train(loaded: LoadedModel, concept: Concept, work: Path, *, watched: bool) -> float:
    """Seconds of a training, with or without a monitor at its default settings."""
    before = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    texts = [loaded.tokenizer(text.text) for text in concept.forget if text.group == "T"]
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=WATCHED_STEPS,
        per_device_train_batch_size=16,
        learning_rate=1e-5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=loaded.device.type == "cpu",
    )
    collator: Any = DataCollatorForLanguageModeling(loaded.tokenizer, mlm=False)
    trainer = Trainer(model=loaded.model, args=arguments, train_dataset=texts, data_collator=collator)
    if watched:
        trainer.add_callback(RelearningMonitor(concept, loaded.tokenizer))
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            parameter.copy_(before[name])
    return seconds


if __name__ == "__main__":
    main()
