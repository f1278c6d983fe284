"""Named benchmarks of the lm-evaluation-harness (extra ``lm-eval``) on a model in memory, item by item.

The harness computes each item's figure; intervals, and differences from the base on the same items, are computed as for
every other measurement here.
"""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...editing.errors import RequestError
from ..drawing import drawn
from ..statistics import Better, Scores

BATCH = 8
LOWER = ("wmdp",)
"""Beginnings of tasks that ask for hazardous knowledge: an edit that removes some should lower them."""


@dataclass(frozen=True)
class Tasks:
    """Tasks that the harness knows."""

    names: tuple[str, ...]
    manager: Any


def find_tasks(names: Sequence[str]) -> Tasks:
    """Look tasks up, and have their data, before any model is loaded.

    Args:
        names: Tasks or groups of the harness, or the YAML file of one's own.

    Raises:
        RequestError: The harness is not installed, knows no such task, or a task's data cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RequestError(
            f"--lm-eval needs the lm-evaluation-harness ({error}); pip install 'excise[lm-eval]'"
        ) from error
    _hush()
    files = {name: Path(name) for name in names if name.endswith((".yaml", ".yml"))}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise RequestError(f"{missing[0]} is no file; give a task's YAML file, or the name of one that the harness has")
    folders = sorted({str(path.parent.resolve()) for path in files.values()})
    # The harness's own 14,000 tasks take seconds to list.
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(names))
    chosen = tuple(_name_in(files[name]) if name in files else name for name in names)
    for name in chosen:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RequestError(f"the lm-evaluation-harness has no task {name!r}{hint} (`lm-eval ls tasks` lists them)")
    with _data_had(chosen):
        manager.load(list(chosen))
    return Tasks(chosen, manager)


def scores(model: Any, tokenizer: Any, tasks: Tasks, limit: int = 0) -> list[Scores]:
    """Every figure that the tasks have for single items.

    Args:
        limit: Items a task, at most, drawn at random; 0 takes all.

    Raises:
        RequestError: A task's data cannot be had, or it has no figures for single items.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    _hush()
    with _data_had(tasks.names):
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            samples=_drawn(tasks, limit) if limit else None,
            # Intervals are computed here, so the harness need not draw any.
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
        )
    assert results is not None, "only further processes of a distributed run get nothing"
    return [one for task, samples in sorted(results["samples"].items()) for one in _scores_of(task, samples)]


def _drawn(tasks: Tasks, limit: int) -> dict[str, list[int]]:
    """Items of each task, by their place. A task does not say which of its items belong together."""
    by_name = tasks.manager.load(list(tasks.names))["tasks"]
    places = {name: list(range(len(list(task.eval_docs)))) for name, task in by_name.items()}
    return {name: drawn(every, every, limit, f"task {name}") for name, every in places.items()}


@contextmanager
def _data_had(names: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(
            f"{', '.join(names)} cannot be run: {reason}; check the names and the connection to the Hub"
        ) from error


def _scores_of(task: str, samples: Sequence[Mapping[str, Any]]) -> list[Scores]:
    better: Better = "lower" if task.startswith(LOWER) else "base"
    by_figure: dict[str, list[tuple[str, float]]] = {}
    counts: dict[str, int] = {}
    for sample in samples:
        way = "" if sample.get("filter", "none") == "none" else f", {sample['filter']}"
        for metric in sample["metrics"]:
            counts[metric + way] = counts.get(metric + way, 0) + 1
            if isinstance(sample[metric], int | float):
                by_figure.setdefault(metric + way, []).append((sample["doc_hash"], float(sample[metric])))
    if not by_figure:
        raise RequestError(f"task {task} has no figure for single items, so it has no interval; leave it out")
    partial = [name for name, items in by_figure.items() if len(items) < counts[name]]
    if partial:
        raise RequestError(
            f"task {task} has {partial[0]} for {len(by_figure[partial[0]])} of {counts[partial[0]]} items, and the rest"
            " would be left out of it; leave the task out"
        )
    return [
        Scores(task, name, "accuracy" if name.startswith("acc") else name, better, ids, totals, (1.0,) * len(ids))
        for name, items in by_figure.items()
        for ids, totals in [tuple(zip(*items, strict=True))]
    ]


class _Untagged(yaml.SafeLoader):
    """Reads past the tags by which the harness's files name functions."""


_Untagged.add_multi_constructor("!", lambda *_: None)


def _name_in(path: Path) -> str:
    """The name that a task's own file gives it."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Untagged)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is no YAML file ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise RequestError(f"{path} names no task; it needs a key `task`")
    return str(content["task"])


def _hush() -> None:
    """The harness logs at length whatever level it is given."""
    for name in ("lm_eval", "lm-eval", "evaluate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
