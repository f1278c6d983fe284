"""A training step of an adapter as the libraries compute it, and as excise does: seconds and operations.

    python benchmarks/layers.py [MODEL] [--concept builtin:potions] [--rounds 9] [--threads 2] [--dtype auto]

One adapter of rank 8 on all layers, a step of at most 32 of the pack's texts (256 tokens of each at most), loss and
gradients. *Libraries*: transformers' and peft's own layers, texts padded in groups of like length, each group forward
and backward. *excise*: one row without padding, in layers of fewer operations. Both in this process, in turn; medians,
and the quartiles of the pairs' ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import choose_dtype, load_model
from excise.artifacts.reporting.terminal import aligned
from excise.editing.architectures import architecture_of, layer_count
from excise.editing.numerics.operation_counts import OperationCounts
from excise.editing.training.adapters import AdapterShape, adapter_modules, attach
from excise.editing.training.packing import packing
from excise.recipes.common.examples import Example, example_batch, sequence_nll, split_by_length
from excise.recipes.common.memory import keep_freed_memory
from peft import LoraConfig, get_peft_model

TEXTS, RANK, ALPHA = 32, 8, 16.0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="builtin:testbed")
    parser.add_argument("--concept", default="builtin:potions")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")
    dtype = choose_dtype(options.dtype, cpu)
    loaded = [load_model(find_model(options.model), cpu, dtype) for _ in range(2)]
    texts = load_concept(options.concept).retain[: 4 * TEXTS]
    ids = sorted((tuple(loaded[0].tokenizer.encode(text.text))[:256] for text in texts), key=len)[
        :: max(1, len(texts) // TEXTS)
    ]
    examples = [Example(one, 1) for one in ids[:TEXTS]]
    tokens = sum(len(one.ids) for one in examples)
    with ExitStack() as context:
        steps = [by_libraries(loaded[0].model, examples), by_excise(loaded[1].model, examples, context)]
        times = in_turn(steps, options.rounds)
        counts = [f"{operations(step):,}" for step in steps]
    ratios = statistics.quantiles((one / two for one, two in zip(*times, strict=True)), n=4)
    print(f"{options.model}, {dtype}, {options.threads} threads, {len(examples)} texts of {tokens} tokens")
    cells = [
        [
            "seconds a step",
            *(f"{statistics.median(some):.3f}" for some in times),
            "{1:.2f} ({0:.2f} to {2:.2f})".format(*ratios),
        ],
        ["operations", *counts, ""],
    ]
    print(aligned(["", "libraries", "excise", "ratio, quartiles"], cells, 100))


def in_turn(steps: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each step in all rounds; the first of each is not counted."""
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(rounds + 1):
        for spent, step in zip(times, steps, strict=True):
            began = time.perf_counter()
            step()
            spent += [time.perf_counter() - began] * bool(turn)
    return times


def by_libraries(model: Any, examples: Sequence[Example]) -> Callable[[], None]:
    """The step with the libraries' own layers."""
    names = adapter_modules(model, architecture_of(model.config.to_dict()), range(layer_count(model.config.to_dict())))
    model.set_attn_implementation("sdpa")
    adapted: Any = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(names)))
    groups, start = [], 0
    for size in split_by_length([len(one.ids) for one in examples]):
        groups.append(examples[start : start + size])
        start += size

    def step() -> None:
        adapted.zero_grad()
        for group in groups:
            sequence_nll(adapted, example_batch(group, in_one_row=False, every=True)).sum().backward()

    return step


def by_excise(model: Any, examples: Sequence[Example], context: ExitStack) -> Callable[[], None]:
    """The step as recipes take it, while the context lasts."""
    config = model.config.to_dict()
    names = adapter_modules(model, architecture_of(config), range(layer_count(config)))
    adapted = attach(model, AdapterShape(RANK, ALPHA, names), seed=0)

    assert context.enter_context(packing(adapted)), "the model reads no packed rows"

    def step() -> None:
        adapted.zero_grad()
        sequence_nll(adapted, example_batch(examples, in_one_row=True, every=True)).sum().backward()

    return step


def operations(step: Callable[[], None]) -> int:
    """Of one step."""
    with OperationCounts() as counts:
        step()
    return counts.operations


if __name__ == "__main__":
    main()
