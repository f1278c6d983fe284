"""ELM's settings searched on small worlds, and held against its defaults on worlds that chose nothing.

    python benchmarks/search_worlds.py [--worlds small] [--trials 12] [--kl 0.02] [--folder DIR]

--worlds holds five small worlds, small-0 to small-4; each is made by

    excise testbed build --out small/small-N --size small --seed N --no-reference

A trial's settings are learned on worlds 0 to 2 (``--budget quick``), each edit is brought to the same KL(base || edited), and
the trial's value is the mean accuracy on held-out questions on the concept over the three, on the half of the items that
chooses. The first trial is the defaults. The best trial and the defaults are then learned on worlds 3 and 4 and asked the
other half of the items; their difference is paired, question by question.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from excise.artifacts.events import Events
from excise.artifacts.models.load import LoadedModel, load_model
from excise.editing.errors import ExciseError
from excise.eval.items import half_of
from excise.eval.measurements.table import scores_of
from excise.eval.statistics import Scores
from excise.recipes.common.measured_run import within_budget
from excise.recipes.elm.space import READY
from excise.recipes.search.bench import Bench
from excise.recipes.search.request import Request, measured_job_of, prepare

SEARCHED, CHECKED = (0, 1, 2), (3, 4)
SPLITS = ("forget_V", "forget_T", "neighbour", "retain")


@dataclass(frozen=True)
class World:
    """One world: its model, loaded once, and the bench on the half of the items that it is asked."""

    number: int
    request: Request
    loaded: LoadedModel
    bench: Bench


def world(number: int, half: str, arguments: argparse.Namespace) -> World:
    """Load a world and measure its base."""
    place = arguments.worlds.absolute() / f"small-{number}"
    settings = ["budget=quick", "questions=0", f"kl_budget={arguments.kl}", "max_strength=8", f"seed={arguments.seed}"]
    request = prepare(
        "elm",
        arguments.folder.absolute() / f"world-{number}",
        assignments=[*settings, *arguments.set],
        flags={"model": str(place / "testbed"), "concept": str(place / "concepts" / "potions")},
        write=False,
    )
    loaded = load_model(request.job.source, request.job.device, request.job.dtype)
    job = replace(request.job, measured=half_of(request.job.concept, half))
    return World(number, request, loaded, Bench(job, loaded, 1))


def learned(of: World, settings: Mapping[str, Any], folder: Path) -> tuple[dict[str, Scores], float, float]:
    """An edit with these settings: accuracy by split, KL on retain texts in nats a token, and the strength it got."""
    folder.mkdir(parents=True)
    job = of.request.job_with(settings, folder / "run")
    edit = of.request.module.learn(job, of.loaded, Events(), folder, of.bench.shared)
    edit = within_budget(measured_job_of(job), edit, of.loaded, Events())
    with of.bench.edited(edit) as sittings:
        subject = sittings["all"].subject
        asked = {one.split: one for one in scores_of("multiple_choice", subject) if one.name == "multiple_choice"}
        kl = next(one.value() for one in scores_of("kl_from_base", subject) if one.split == "retain")
    return asked, kl, edit.provenance["kl_budget"]["strength"]


def search(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of the best trial; the first trial is the defaults, so the best is never worse on what chose it."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    worlds = [world(number, "search", arguments) for number in SEARCHED]
    rows: list[tuple[float, dict[str, Any]]] = []
    shape = {name: _distribution(one) for name, one in READY.space.items()}
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=arguments.seed, multivariate=True, n_startup_trials=5)
    )
    for number in range(arguments.trials):
        trial = study.ask(shape) if number else None
        settings = dict(trial.params) if trial else {}
        began, cells = time.monotonic(), []
        try:
            for one in worlds:
                asked, kl, strength = learned(one, settings, arguments.folder / "trials" / f"{number}-{one.number}")
                cells.append((asked["forget_V"].value(), kl, strength))
            value = sum(cell[0] for cell in cells) / len(cells)
        except ExciseError as error:
            value, cells = math.inf, [str(error)]
        if trial:
            study.tell(trial, value if math.isfinite(value) else None, state=None if math.isfinite(value) else FAILED)
        rows.append((value, settings))
        print(f"trial {number}: mean {value:.3f}  {cells}  {settings}  {time.monotonic() - began:.0f} s", flush=True)
    return min(rows, key=lambda row: row[0])[1]


FAILED = optuna.trial.TrialState.FAIL


def _distribution(one: Any) -> optuna.distributions.BaseDistribution:
    if one.choices:
        return optuna.distributions.CategoricalDistribution(one.choices)
    kind = optuna.distributions
    whole = isinstance(one.low, int) and isinstance(one.high, int)
    return (kind.IntDistribution if whole else kind.FloatDistribution)(one.low, one.high, log=one.log)


def check(chosen: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    """Both settings on worlds that chose nothing, on the half that is reported."""
    both: dict[str, dict[str, list[Scores]]] = {"defaults": {}, "chosen": {}}
    for number in CHECKED:
        of = world(number, "report", arguments)
        base = {
            one.split: one
            for one in scores_of("multiple_choice", of.bench.base["all"].subject)
            if one.name == "multiple_choice"
        }
        print(f"world {number}, base: " + ", ".join(f"{name} {_shown(base[name])}" for name in SPLITS))
        for name, settings in (("defaults", {}), ("chosen", chosen)):
            asked, kl, strength = learned(of, settings, arguments.folder / "checked" / f"{name}-{number}")
            for split in SPLITS:
                both[name].setdefault(split, []).append(asked[split])
            print(f"world {number}, {name}: " + ", ".join(f"{one} {_shown(asked[one])}" for one in SPLITS), end="")
            print(f", KL {kl:.4f} at strength {strength:.2f}", flush=True)
    for split in SPLITS:
        ours, theirs = (joined(both[name][split]) for name in ("chosen", "defaults"))
        apart = ours.difference(theirs)
        low, high = apart.ci95 or (math.nan, math.nan)
        print(
            f"{split}: chosen {_shown(ours)}, defaults {_shown(theirs)}, difference {apart.value:+.3f} [{low:+.3f}, {high:+.3f}],"
            f" n = {len(ours.ids)}"
        )


def joined(scores: Sequence[Scores]) -> Scores:
    """Items of several worlds as those of one; subjects of two worlds are different ones."""
    ids = tuple(f"{place} {one}" for place, of in enumerate(scores) for one in of.ids)
    clusters = tuple(f"{place} {one}" for place, of in enumerate(scores) for one in of.clusters or of.ids)
    totals, weights = ([value for of in scores for value in getattr(of, name)] for name in ("totals", "weights"))
    return replace(scores[0], ids=ids, totals=tuple(totals), weights=tuple(weights), clusters=clusters)


def _shown(scores: Scores) -> str:
    low, high = scores.interval() or (math.nan, math.nan)
    return f"{scores.value():.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Search, then check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=Path, default=Path("small"))
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--kl", type=float, default=0.02, help="KL(base || edited) of every edit, nats a token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of every run, such as steps=30")
    parser.add_argument("--chosen", type=json.loads, help="settings to check without a search, as JSON")
    parser.add_argument("--folder", type=Path, default=Path("search-worlds"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    chosen = search(arguments) if arguments.chosen is None else arguments.chosen
    print(f"chosen: {json.dumps(chosen)}", flush=True)
    check(chosen, arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
