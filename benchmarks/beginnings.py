"""Processor seconds and tokens with and without what is read once: beginnings that sequences and questions share.

    python benchmarks/beginnings.py [--model builtin:testbed] [--concept builtin:potions] [--rounds 9] [--dtype float32]

Five pieces of work, each in both ways in turn, in this process, by one thread: a look of an audit (an attacker is asked
the questions of group V and 48 others), a step of six attackers, a step of one adapter on 32 sequences, the frozen
model's reading of all contexts of the pack's facts, and its replies to the questions of group V in chat, of at most 24
tokens. *Apart*: questions stand padded below each other, every sequence is read whole, and replies are decoded by
transformers. The last line is of products alone: the narrow factors of a low-rank layer's gradient on the right, as it
is mostly written, and on the left. Medians, and the interquartile range of the ratios of pairs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import choose_dtype, load_model
from excise.artifacts.reporting.terminal import aligned
from excise.editing.architectures import architecture_of, layer_count
from excise.editing.hooks.token_counts import TOKENS, count_tokens
from excise.editing.training import packing
from excise.editing.training.adapters import adapter_modules
from excise.editing.training.parallel_adapters import low_rank_attackers
from excise.eval.inference import generation
from excise.eval.inference.questions import questions_by_split
from excise.recipes.audit.attack_data import AttackData
from excise.recipes.audit.request import questions_at_looks
from excise.recipes.common.examples import Example, example_batch, sequence_nll
from excise.recipes.common.prefix_cache import final_hidden_states
from excise.recipes.data.facts import find_facts

ATTACKERS, BATCH, OTHERS = 6, 8, 48


@dataclass(frozen=True)
class Work:
    """One piece of work in both ways."""

    name: str
    apart: Callable[[], object]
    once: Callable[[], object]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:testbed")
    parser.add_argument("--concept", default="builtin:potions")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    loaded = load_model(find_model(options.model), cpu, choose_dtype(options.dtype, cpu))
    concept, read = load_concept(options.concept), [0]
    count_tokens(loaded.model, lambda name, number: read.__setitem__(0, read[0] + int(number) * (name == TOKENS)))
    questions = tuple(questions_by_split(concept, 80)["forget_V"])
    others = tuple(questions_at_looks(concept, OTHERS))
    data = AttackData(concept, find_facts(concept), questions, loaded.tokenizer, 0, others=others)
    with ExitStack() as context:
        lines = [measured(work, options.rounds, read) for work in pieces(loaded.model, data, context)]
    lines.append(measured(narrow_factors(), options.rounds, read))
    header = ["processor ms", "apart", "once", "ratio, quartiles", "tokens apart", "once"]
    print(aligned(header, lines, 120))


def pieces(model: Any, data: AttackData, context: ExitStack) -> Iterator[Work]:
    """The work that a model does, with its attackers in place while the context lasts."""
    config = model.config.to_dict()
    names = adapter_modules(model, architecture_of(config), range(layer_count(config)))
    rows = {row.ids: len(row.ids) for row in data.examples["T"]}

    def contexts(once: bool) -> None:
        with packing.packing(model) if once else nullcontext():
            for _ in final_hidden_states(model, rows):
                pass

    yield Work("all contexts of facts", lambda: contexts(False), lambda: contexts(True))
    asked = [question.prompt for question in data.questions]

    def replies(once: bool) -> None:
        with packing.packing(model) if once else patch.object(generation, "goes_on_in_step", lambda _: False):
            generation.generate(model, data.tokenizer, asked, 24)

    yield Work(f"{len(asked)} replies", lambda: replies(False), lambda: replies(True))
    can = context.enter_context(packing.packing(model))
    assert can, "the model reads no packed rows, so that nothing is shared"
    adapters = context.enter_context(low_rank_attackers(model, names, 8, 16.0, range(ATTACKERS)))

    def look(once: bool) -> None:
        with adapters.only(0), nullcontext() if once else padded():
            data.ask(model)

    yield Work("a look", lambda: look(False), lambda: look(True))
    orders = [data.reading_order("T", BATCH, f"{place}") for place in range(ATTACKERS)]
    many = [one for source in ("T", "V", "related", "retain") for one in data.reading_order(source, BATCH, "0")]
    for name, groups in ((f"a step of {ATTACKERS} attackers", orders), ("a step on 32 sequences", [many])):
        yield Work(
            name, lambda g=groups: step(model, adapters, g, False), lambda g=groups: step(model, adapters, g, True)
        )


def step(model: Any, adapters: Any, groups: Sequence[Sequence[Example]], once: bool) -> None:
    """Loss and gradients of attackers, each on its group of sequences."""
    examples = [example for group in groups for example in group]
    owners = [number for number, group in enumerate(groups) for _ in group]
    with nullcontext() if once else nothing_shared():
        batch = example_batch(examples, in_one_row=True, by_length=False, every=not once, owners=owners)
    counts = batch["owned"] if once else [sum(len(one.ids) for one in group) for group in groups]
    # What a row is filled up with stands at its end.
    counts = [*counts[:-1], batch["input_ids"].numel() - sum(counts[:-1])]
    with adapters.sharing(range(len(groups)), counts):
        loss = sequence_nll(model, batch).sum()
    owned = [parameter for place in range(len(groups)) for parameter in adapters.owned[place]]
    torch.autograd.grad(loss, owned)


@contextmanager
def nothing_shared() -> Iterator[None]:
    """Every sequence has an owner of its own."""
    shared = packing._shared
    with patch.object(packing, "_shared", lambda rows, owners, **how: shared(rows, range(len(rows)), **how)):
        yield


@contextmanager
def padded() -> Iterator[None]:
    """Questions are asked as of a model that reads no packed rows."""
    with ExitStack() as patches:
        for module in ("likelihood", "read_prompts"):
            patches.enter_context(patch(f"excise.eval.inference.{module}.is_packing", lambda model: False))
        yield


def narrow_factors() -> Work:
    """The gradients of a low-rank update of a product of 192 to 512 features, for 800 tokens."""
    x, gradient, down, up = (torch.randn(*shape) for shape in ((800, 192), (800, 512), (8, 192), (512, 8)))

    def on_the_right() -> None:
        (gradient @ up).mT @ x, ((x @ down.mT).mT @ gradient).mT.contiguous()

    def on_the_left() -> None:
        (up.mT @ gradient.mT) @ x, ((down @ x.mT) @ gradient).mT.contiguous()

    return Work("narrow factors, right and left", on_the_right, on_the_left)


def measured(work: Work, rounds: int, read: list[int]) -> list[str]:
    """A line of the table."""
    ways, tokens, times = (work.apart, work.once), [], []
    for way in ways:
        read[0] = 0
        way()
        tokens.append(read[0])
    for _ in range(rounds):
        times.append([_processor_seconds(way) for way in ways])
    ratios = [once / apart for apart, once in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    apart, once = (1000 * statistics.median(each) for each in zip(*times, strict=True))
    counts = [f"{count:,}" if count else "" for count in tokens]
    return [work.name, f"{apart:.1f}", f"{once:.1f}", f"{middle:.2f} ({low:.2f} to {high:.2f})", *counts]


def _processor_seconds(way: Callable[[], object]) -> float:
    start = time.process_time()
    way()
    return time.process_time() - start


if __name__ == "__main__":
    main()
