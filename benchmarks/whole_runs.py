"""Where the time of whole runs goes: every stage's seconds and tokens, beside what its matrix products alone take.

    python benchmarks/whole_runs.py [elm,orthogonalize,...] [--model builtin:testbed] [--concept PACK] [--set key=value]
        [--device cpu] [--dtype auto] [--rounds 3] [--before FOLDER] [--attacks NAMES] [--json]
    python benchmarks/whole_runs.py --products [--model builtin:testbed]

Each run is the real command line, in a process of its own and with an empty cache. Stages say themselves how many
tokens they read (``events.jsonl``). The floor of a stage is the time of the layers' products with its tokens, padding
left out, and of the unembedding's with the positions that are scored, forward and, where there is a gradient, back to
the inputs; each at the rate that this machine reaches for that product now, with 512 tokens at a time. A ratio of 1
would be a run that does nothing else. Decoding reads few tokens at a time, at a lower rate than that, and an update of
whole weights takes one more product. ``audit`` is the quick one of the edit before it; its processes work beside each
other, so that its stages may take more seconds than the whole. With ``--rounds`` each run is made so often, one after
the other in turn, and the table is that of the run with the median time. Runs of different machines compare by tokens,
padding and ratio. With ``--before``, another checkout of this repository, its code makes the same runs in turn with
this one, and what each of its runs took stands beside; ``--attacks`` lets both audits make the same attacks.
``--products`` runs nothing and times the products alone: in fp32, in bfloat16, and in bfloat16 widened to fp32 for one
product, as attackers make them where that is faster.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.event_log import read_events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import choose_dtype
from excise.artifacts.reporting.terminal import aligned
from excise.editing.hooks.token_counts import DIFFERENTIATED, PADDING, SCORED, TOKENS
from excise.editing.modules import is_conv1d, is_linear
from excise.editing.wiring.small_copy import full_config, model_class

RUNS = ("elm", "audit", "orthogonalize", "prune", "caft", "npo")
FEWEST_SECONDS = 0.5
"""Of a stage that has a line of its own."""
AT_ONCE = 512
"""Tokens of the products that are timed."""


@dataclass(frozen=True)
class StageTime:
    """One stage of a run, or all stages of one name."""

    name: str
    seconds: float
    tokens: int = 0
    """Positions that the layers read, padding among them."""
    padding: int = 0
    floor: float = 0.0
    """Seconds of the matrix products alone."""

    def cells(self) -> list[str]:
        """A line of the table."""
        if not self.tokens:
            return [self.name, f"{self.seconds:.1f}", "", "", "", ""]
        ratio = f"{self.seconds / self.floor:.2f}" if self.floor else ""
        share = f"{self.padding / self.tokens:.1%}"
        return [self.name, f"{self.seconds:.1f}", f"{self.tokens:,}", share, f"{self.floor:.1f}", ratio]


@dataclass(frozen=True)
class TimedRun:
    """A whole command."""

    seconds: float
    processor: float
    """What processors worked for it."""
    stages: list[StageTime]

    def table(self) -> str:
        """All stages."""
        header = ["stage", "seconds", "tokens", "padding", "floor", "ratio"]
        return aligned(header, [one.cells() for one in self.stages], 110)


@dataclass(frozen=True)
class Rate:
    """Seconds of matrix products."""

    token: float
    """Of all layers, for one token, forward."""
    position: float
    """Of the unembedding, for one position, forward."""

    def floor(self, counts: dict[str, Any]) -> float:
        """Seconds of a stage's products."""
        tokens = counts.get(TOKENS, 0)
        if not tokens:
            return 0.0
        passes = 1 + counts.get(DIFFERENTIATED, 0) / tokens
        real = tokens - counts.get(PADDING, 0)
        return passes * (self.token * real + self.position * counts.get(SCORED, 0))


def main() -> None:
    """Run each and print its table, or all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", default=",".join(RUNS), help="Recipes, and audit; comma-separated.")
    parser.add_argument("--model", default="builtin:testbed")
    parser.add_argument("--concept", help="By default each recipe's own.")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=1, help="How often each is run; the median counts.")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="A checkout whose code makes the same runs.")
    parser.add_argument("--attacks", help="Of audit, comma-separated; by default those of its budget.")
    parser.add_argument("--json", action="store_true", help="One object for all runs, to stdout.")
    parser.add_argument("--products", action="store_true", help="Time products in fp32, in bfloat16 and widened.")
    options = parser.parse_args()
    if options.products:
        return print(products(options.model))
    rate = measured_rate(options.model, options.device, options.dtype)
    made: dict[str, list[TimedRun]] = {}
    before: dict[str, list[TimedRun]] = {}
    codes = [(before, options.before), (made, None)] if options.before else [(made, None)]
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="excise-whole-runs-") as place:
            runs = [
                (into, once(options, rate, Path(place) / str(turn), code)) for turn, (into, code) in enumerate(codes)
            ]
            for _ in options.runs.split(","):
                for into, each in runs:
                    name, timed = next(each)
                    into.setdefault(name, []).append(timed)
                    if not options.json:
                        which = "" if into is made else " before"
                        print(f"round {number + 1}: {name}{which} {timed.seconds:.0f} s", flush=True)
    found = {name: sorted(runs, key=lambda one: one.seconds)[len(runs) // 2] for name, runs in made.items()}
    if options.json:
        return print(json.dumps(as_json(found, made, before), indent=1))
    for name, one in found.items():
        print(f"\n{name}: {one.seconds:.0f} s, of processors {one.processor:.0f}{every(made[name])}")
        if before:
            ratios = sorted(early.seconds / late.seconds for early, late in zip(before[name], made[name], strict=True))
            median = sorted(early.seconds for early in before[name])[len(ratios) // 2]
            told = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"before: {median:.0f} s{every(before[name])}; pairs' ratios {told}")
        print(one.table())


def as_json(found: dict[str, TimedRun], made: dict[str, list[TimedRun]], before: dict[str, list[TimedRun]]) -> Any:
    """The stages of each median run, and the seconds of all."""
    return {
        name: {
            "stages": [asdict(one) for one in timed.stages],
            "seconds": [one.seconds for one in made[name]],
            "before": [one.seconds for one in before.get(name, [])],
        }
        for name, timed in found.items()
    }


def once(options: argparse.Namespace, rate: Rate, place: Path, code: Path | None) -> Iterator[tuple[str, TimedRun]]:
    """Each of the runs, one after the other, by this code or another's."""
    edited = None
    place.mkdir()
    if code is not None:
        # The package's name is the folder's.
        (place / "code").mkdir()
        (place / "code" / "excise").symlink_to(code.resolve(), target_is_directory=True)
    for name in options.runs.split(","):
        out = place / name
        if name == "audit" and edited is None:
            sys.exit("audit needs the edit of a run before it: elm,audit")
        words = command(name, out, edited, options)
        seconds, processor = run(words, place / f"{name}-cache", place / "code" if code else None)
        edited = edited if name == "audit" else out
        # Earlier code may have told its stages in another way.
        yield name, TimedRun(seconds, processor, [] if code else stages(out / "events.jsonl", seconds, rate))


def every(runs: Sequence[TimedRun]) -> str:
    """The times of several runs, of which the median is shown."""
    return f" (median of {', '.join(f'{one.seconds:.0f}' for one in runs)})" if len(runs) > 1 else ""


def command(name: str, out: Path, edited: Path | None, options: argparse.Namespace) -> list[str]:
    """The words of one run."""
    words = ["audit", str(edited), "--budget", "quick"] if name == "audit" else ["run", name, "--model", options.model]
    if name == "audit" and options.attacks:
        words += ["--attacks", options.attacks]
    words += ["--device", options.device, "--dtype", options.dtype, "--out", str(out), "--json"]
    if options.concept:
        words += ["--concept", options.concept]
    return words + ([word for pair in options.settings for word in ("--set", pair)] if name != "audit" else [])


def run(words: list[str], cache: Path, code: Path | None) -> tuple[float, float]:
    """Seconds of a whole command, and what processors worked for it, which other work beside it changes less."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    if code:
        # Alone: beside this code, a checkout without an __init__.py would not be found.
        environment["PYTHONPATH"] = str(code)
        _check(code, environment)
    start, before = time.perf_counter(), _processor_seconds()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "excise.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        sys.exit(f"excise {' '.join(words)}\n{done.stderr[-2000:]}")
    return time.perf_counter() - start, _processor_seconds() - before


def _check(code: Path, environment: dict[str, str]) -> None:
    """Refuse a checkout whose code is not what would run, because an installed one comes first."""
    asked = [sys.executable, "-P", "-c", "import excise.cli; print(excise.cli.__file__)"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False, env=environment).stdout.strip()
    wanted = code / "excise" / "cli.py"
    if not told or not wanted.exists() or not wanted.samefile(told):
        sys.exit(f"--before: {wanted.resolve()} would not run, but {told or 'nothing'}; install excise with -e")


def _processor_seconds() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def stages(events: Path, whole: float, rate: Rate) -> list[StageTime]:
    """What a run's stages took, the short ones and what stands between them in one line, and last the sum."""
    sums: dict[str, dict[str, Any]] = {}
    for event in read_events(events):
        if "seconds" in event["metrics"]:
            of_stage = sums.setdefault(event["stage"], {})
            for key, value in event["metrics"].items():
                of_stage[key] = of_stage.get(key, 0) + value
    lines = [
        StageTime(name, counts["seconds"], counts.get(TOKENS, 0), counts.get(PADDING, 0), rate.floor(counts))
        for name, counts in sums.items()
    ]
    shown = [line for line in lines if line.seconds >= FEWEST_SECONDS]
    spent = sum(line.seconds for line in shown)
    rest = StageTime(
        "start-up, and the rest" if spent < whole else "stages of several processes overlap", whole - spent
    )
    tokens, padding = sum(line.tokens for line in lines), sum(line.padding for line in lines)
    return [*shown, rest, StageTime("whole run", whole, tokens, padding, sum(line.floor for line in lines))]


def measured_rate(ref: str, device: str, dtype: str) -> Rate:
    """Time each distinct product of a model's layers and of its unembedding on random numbers."""
    where, kind = torch.device(device), choose_dtype(dtype, torch.device(device))
    shapes, (width, vocabulary) = shapes_of(ref)
    token = sum(count * seconds_of_product(*shape, where, kind) for shape, count in shapes.items())
    return Rate(token, seconds_of_product(width, vocabulary, where, kind))


def shapes_of(ref: str) -> tuple[dict[tuple[int, int], int], tuple[int, int]]:
    """Inputs and outputs of the layers' products, with how often each occurs, and of the unembedding."""
    from accelerate import init_empty_weights

    config = open_checkpoint(find_model(ref).folder).config
    with init_empty_weights():
        model = model_class(config)._from_config(full_config(config))
    head = model.get_output_embeddings()
    shapes: dict[tuple[int, int], int] = {}
    for module in model.modules():
        if is_linear(module) and module is not head:
            weight: Any = module.weight
            shape = (weight.shape[0], weight.shape[1]) if is_conv1d(module) else (weight.shape[1], weight.shape[0])
            shapes[shape] = shapes.get(shape, 0) + 1
    vocabulary, width = head.weight.shape
    return shapes, (width, vocabulary)


def products(ref: str) -> str:
    """A table: each product of a model's layers on this processor, in fp32, in bfloat16 and widened to fp32."""
    cpu, ways = torch.device("cpu"), ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
    lines = []
    for width, outputs in dict.fromkeys(shapes_of(ref)[0]):
        seconds = [AT_ONCE * seconds_of_product(width, outputs, cpu, dtype, widened=widened) for dtype, widened in ways]
        work = 2 * AT_ONCE * width * outputs
        lines.append([f"{width} to {outputs}", *(f"{1e6 * one:.0f} ({work / one / 1e9:.0f})" for one in seconds)])
    header = [f"{AT_ONCE} tokens, us (GFLOP/s)", "float32", "bfloat16", "widened to float32"]
    return aligned(header, lines, 110)


def seconds_of_product(
    width: int, outputs: int, device: torch.device, dtype: torch.dtype, *, widened: bool = False
) -> float:
    """Of a token with one matrix, the fastest of several; ``widened`` converts operands to fp32 and the result back."""
    inputs = torch.randn(AT_ONCE, width, device=device, dtype=dtype)
    weight = torch.randn(outputs, width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        _finished()
        start = time.perf_counter()
        if widened:
            (inputs.float() @ weight.float().mT).to(dtype)
        else:
            inputs @ weight.mT
        _finished()
        best = min(best, time.perf_counter() - start)
    return best / AT_ONCE


def _finished() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
