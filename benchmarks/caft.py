"""What ablating concepts costs a fine-tune, and finding directions a forward: ``python benchmarks/caft.py``.

The one against the same fine-tune without ablation; the other, reading every position at the output of every layer into
streaming moments, against a bare forward of the same sequences.

Rounds are interleaved, and the ratio is the median over rounds.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.architectures import architecture_of, layer_count
from excise.editing.directions.subspaces import Place, Subspace, principal_components
from excise.editing.hooks.concept_ablation import concept_ablated
from excise.editing.hooks.residual_stream import run_decoder
from excise.editing.numerics.moments import Moments
from excise.editing.training.adapters import AdapterShape, adapter_modules, attach, detach
from excise.editing.wiring.row import Architecture
from excise.eval.inference.likelihood import pad_right
from excise.recipes.caft.direction_sources import BATCH, activations
from excise.recipes.common.examples import completion_loss, example_batch
from excise.recipes.common.tokens import Row
from excise.recipes.common.trainer import Schedule, fit
from excise.recipes.data.datasets import encoded

READ = 320
"""Sequences that directions are found in."""


def main() -> None:
    """Print seconds of each and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:testbed")
    parser.add_argument("--concept", default="builtin:shortcut")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directions", type=int, default=8, help="At the output of each layer.")
    options = parser.parse_args()
    loaded = load_model(find_model(options.model), torch.device("cpu"), torch.float32)
    examples = encoded(load_concept(options.concept).train, loaded.tokenizer, 512).examples
    config = loaded.model.config.to_dict()
    row, layers, width = architecture_of(config), layer_count(config), loaded.model.config.hidden_size
    shape = AdapterShape(8, 16.0, adapter_modules(loaded.model, row, range(layers)))
    subspaces = [
        Subspace(
            Place(layer),
            torch.linalg.qr(torch.randn(width, options.directions)).Q,
            torch.zeros(width),
            tuple(map(str, range(options.directions))),
            (0.0,) * options.directions,
            "random",
        )
        for layer in range(layers)
    ]

    def seconds(ablating: bool) -> float:
        model: Any = attach(loaded.model, shape, 0)
        schedule = Schedule(options.steps, 16, 1e-4, 0, save_every=0)
        with tempfile.TemporaryDirectory() as folder, Events().stage("train") as stage:
            with concept_ablated(model, row, subspaces) if ablating else nullcontext():
                start = time.perf_counter()
                fit(model, examples, stage, Path(folder), completion_loss, schedule, example_batch)
                took = time.perf_counter() - start
        detach(model)
        return took

    seconds(True)
    rounds = [(seconds(False), seconds(True)) for _ in range(options.rounds)]
    ratios = [ablated / plain for plain, ablated in rounds]
    print(f"{options.steps} steps, {options.directions} directions at each of {layers} layers, {options.rounds} rounds")
    print(
        f"plain {statistics.median(p for p, _ in rounds):.2f} s, ablated {statistics.median(a for _, a in rounds):.2f} "
        "s"
    )
    print(f"ratio {statistics.median(ratios):.3f} ({', '.join(f'{ratio:.3f}' for ratio in sorted(ratios))})")
    rows = [example.ids for example in examples[:READ]]
    places = [Place(layer) for layer in range(layers)]
    bare, read = (lambda: forward(loaded.model, rows)), (lambda: extract(loaded.model, row, rows, places, width))
    bare(), read()
    pairs = [(timed(bare), timed(read)) for _ in range(options.rounds)]
    tokens = sum(map(len, rows))
    shares = sorted(plain / with_reading for plain, with_reading in pairs)
    plain, with_reading = (tokens / statistics.median(values) for values in zip(*pairs, strict=True))
    print(
        f"finding directions: {with_reading:,.0f} tokens/s, a bare forward {plain:,.0f}; share of its throughput "
        f"{statistics.median(shares):.3f} ({', '.join(f'{share:.3f}' for share in shares)})"
    )


def timed(work: Callable[[], None]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def forward(model: Any, rows: Sequence[Row]) -> None:
    """The decoder alone, batch by batch."""
    for start in range(0, len(rows), BATCH):
        run_decoder(model, pad_right(rows[start : start + BATCH], model.device))


def extract(model: Any, row: Architecture, rows: Sequence[Row], places: Sequence[Place], width: int) -> None:
    """Streaming mean and covariance at every place, and their components."""
    moments = {place: Moments(width, covariance=True) for place in places}
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        values = activations(model, row, batch, places)
        seen = pad_right(batch, torch.device("cpu"))["attention_mask"].bool()
        for place in places:
            moments[place].update(values[place][seen])
    for place in places:
        principal_components(moments[place], 8, place)


if __name__ == "__main__":
    main()
