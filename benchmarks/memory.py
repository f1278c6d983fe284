"""Planned memory against what a process holds, stage by stage.

    python benchmarks/memory.py [MODEL] [--recipes npo,elm,...] [--dtype float32] [--learning] [--tensors]

Each recipe runs in a process of its own, on texts of 512 tokens, with few steps: the peak does not depend on their
number. Measured is the peak of the resident memory (VmHWM) of each stage, less what the process held before the model
was loaded. Freed memory goes back to the system at once, so that a stage is not charged with what one before it left:
this costs time, and runs themselves do not do it. With ``--learning`` nothing is measured before and after, which is
most of the time and takes the same memory for every recipe. With ``--tensors`` what PyTorch's allocator gives out is counted
instead: what differs from the process's memory is none of the plan's making.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

RECIPES = (
    "orthogonalize", "prune", "grad_diff", "npo", "simnpo", "jensun", "tar", "rmu", "elm", "repselect", "lorra", "caft",
    "distill", "audit",
)  # fmt: skip
TEXTS = 4
PIECE = 2600
"""Characters of a text: some more than 512 tokens."""
FEW: dict[str, list[str]] = {
    "orthogonalize": ["train_pairs=16", "validation_pairs=8", "positions=1", "use_rejected_direction=true"],
    "prune": ["examples=32", "validate_units=0", "share=0.02"],
    **{name: ["steps=2", "batch_size=2"] for name in ("grad_diff", "npo", "simnpo", "jensun", "tar", "rmu")},
    "elm": ["steps=2", "batch_size=2", "contrast=subjects", "strength=1", "max_contexts=16", "chat_facts=1"],
    "repselect": ["texts=32", "batch_size=2"],
    "lorra": ["steps=2", "batch_size=8", "concept=builtin:declining"],
    "caft": ["steps=2", "batch_size=2", "concept=builtin:shortcut", "directions=none"],
    "distill": ["steps=2", "batch_size=1", "samples=0"],
}
MEASURED = ["questions=8", "kl_prompts=4", "max_new_tokens=8", "fresh=true"]
STAGES = {
    "load base": "load",
    "load the base": "load",
    "measure base": "measure the base",
    "measure edited": "measure the edited",
    "learn directions": "learn directions",
    "read the base on what is to be trained": "read the base",
    "read the teacher": "read the teacher",
    "read the vectors": "read the vectors",
    "read what is to be learned": "read the models",
    "train the adversary": "train",
    "train the control: none": "train",
    "sum gradients of the concept": "sum gradients",
    "choose the strength by kl_budget": "choose the strength",
    "train": "train",
    "score units on what to forget": "score units",
    "score units on what to retain": "score units",
    "compare with controls": "compare with controls",
    "question edited": "ask the questions",
    "attack edited: rtt": "attack: low_rank",
    "train the suppressed control": "train the suppressed control",
    "train the locked control": "train the locked control",
    "train the removal control": "train the removal control",
    "compare the weights": "compare the weights",
}
"""Stages of a run, and of the plan."""


def main() -> None:
    """Print a table of all recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="builtin:testbed")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--characters", type=int, default=PIECE, help="Length of the long texts.")
    parser.add_argument("--learning", action="store_true", help="Learn the edit alone.")
    parser.add_argument("--tensors", action="store_true", help="Count what PyTorch's allocator gives out.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        how = {"tensors": options.tensors, "learning": options.learning}
        found = one(options.one, options.model, options.dtype, options.characters, **how)
        return print(json.dumps(found))
    print(f"{'recipe':14} {'stage':22} {'planned':>9} {'measured':>9} {'ratio':>6}   MB, {options.model}")
    for recipe in options.recipes.split(","):
        # Memory that is freed goes back at once.
        malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        words = [sys.executable, __file__, options.model, "--dtype", options.dtype, "--one", recipe]
        words += ["--characters", str(options.characters), *(["--tensors"] if options.tensors else [])]
        words += ["--learning"] if options.learning else []
        began = time.monotonic()
        done = subprocess.run(words, env=os.environ | malloc, capture_output=True, text=True, check=False)
        print(f"# {recipe}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if done.returncode:
            print(f"{recipe:14} failed: {done.stderr.strip().splitlines()[-1][:90]}")
            continue
        show(recipe, json.loads(done.stdout.splitlines()[-1]))


def show(recipe: str, found: dict[str, Any]) -> None:
    """The stages of one recipe, and its peak."""
    rows = [(name, found["planned"].get(name), found["measured"].get(name)) for name in found["measured"]]
    for name, planned, measured in rows:
        if planned is not None:
            print(f"{recipe:14} {name:22} {planned / 1e6:9.1f} {measured / 1e6:9.1f} {planned / measured:6.2f}")
    peaks = [max(found[side].values()) for side in ("planned", "measured")]
    print(f"{recipe:14} {'PEAK':22} {peaks[0] / 1e6:9.1f} {peaks[1] / 1e6:9.1f} {peaks[0] / peaks[1]:6.2f}", flush=True)


class Peaks:
    """A watcher that notes the peak of each stage."""

    def __init__(self, counter: "Process | Tensors") -> None:
        self.counter, self.stages, self.name = counter, dict[str, int](), ""

    def start(self, stage: str, total: int | None) -> None:
        # What comes between stages counts to none of them.
        self._note("between")
        self.name = stage

    def advance(self, steps: int, metrics: dict[str, Any]) -> None:
        """Nothing: the peak is read at the end."""

    def stop(self) -> None:
        self._note(STAGES.get(self.name, self.name))

    def _note(self, name: str) -> None:
        self.stages[name] = max(self.stages.get(name, 0), self.counter.peak())


class Process:
    """The peak of the resident memory since the last time it was asked for, less what there was at first."""

    def __init__(self) -> None:
        self.before = of_process("VmRSS")
        self._reset()

    def peak(self) -> int:
        found = of_process("VmHWM") - self.before
        self._reset()
        return found

    def _reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")


class Tensors:
    """The peak of what PyTorch's allocator has given out, by its own count."""

    def __init__(self) -> None:
        self._begin()

    def peak(self) -> int:
        from torch._C._profiler import _EventType

        self.profile.__exit__(None, None, None)
        roots = self.profile.profiler.kineto_results.experimental_event_tree()
        found = [e.extra_fields.total_allocated for e in walked(roots) if e.tag == _EventType.Allocation]
        self._begin()
        return max(found, default=0)

    def _begin(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        # What is freed while no profile is taken stays counted; nothing is between two stages.
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False)
        self.profile.__enter__()


def walked(events: Iterable[Any]) -> Iterator[Any]:
    """All events of a tree."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        yield event
        waiting += event.children


def one(
    recipe: str, model: str, dtype: str, characters: int = PIECE, *, tensors: bool = False, learning: bool = False
) -> dict[str, Any]:
    """Plan and run one recipe in this process."""
    import importlib

    from excise.artifacts.events import Events
    from excise.recipes import RECIPES as TABLE
    from excise.recipes.audit import locked_control, removal_control, suppressed_control
    from excise.recipes.audit import recipe as audit
    from excise.recipes.audit.attacks import table
    from excise.recipes.common.settings import load_settings

    with tempfile.TemporaryDirectory() as place:
        pack, out = long_texts(Path(place) / "pack", characters), Path(place) / "out"
        base = {"concept": str(pack), "out": out, "device": "cpu", "dtype": dtype, "seed": 0}
        if recipe == "audit":
            edited = copy_of(model, Path(place) / "edited")
            suppressed_control.STEPS = locked_control.STEPS = removal_control.STEPS = 2
            locked_control.ROUNDS = removal_control.ROUNDS = 1
            table.BUDGETS["quick"] = table.Budget((), 2, 2, {"low_rank": (1e-3,)}, batch=2)
            words = ["questions=20", "attacks=[few_shot, rtt]", "fresh=true", "locked=true", "removed=true"]
            module, kind, base = audit, audit.AuditSettings, {**base, "model": str(edited), "base": model}
        else:
            module = importlib.import_module(TABLE[recipe].module)
            kind, words = getattr(module, TABLE[recipe].settings), [*MEASURED, *FEW[recipe]]
            base["model"] = model
            if recipe == "distill":
                base["teacher"] = str(copy_of(model, Path(place) / "edited"))
        given = {word.partition("=")[0] for word in words}
        settings = load_settings(kind, None, words, {k: v for k, v in base.items() if k not in given})
        warm_up()
        job = module.prepare(settings)
        plan = module.memory(job).as_json()
        peaks = Peaks(Tensors() if tensors else Process())
        if learning:
            learn(module, job, Events(watcher=peaks), Path(place))
            forget_measuring(plan["stages"], job)
        else:
            module.run(job, Events(watcher=peaks))
    if recipe == "audit":
        # Models are asked in several formats before the first stage that has a name.
        peaks.stages["ask the questions"] = max(peaks.stages["ask the questions"], peaks.stages["between"])
    planned = {stage["name"].partition(" (")[0]: stage["total"] for stage in plan["stages"]}
    return {"planned": planned, "measured": peaks.stages}


def learn(module: Any, job: Any, events: Any, work: Path) -> None:
    """The edit alone."""
    from excise.artifacts.models.load import load_model

    run = run_of(job)
    with events.stage("load the base"):
        loaded = load_model(run.source, run.device, run.dtype)
    module.learn(job, loaded, events, work, {})


def forget_measuring(stages: list[dict[str, Any]], job: Any) -> None:
    """Take from a plan what only measuring leaves behind, and its stages."""
    from excise.recipes.common.memory_plan import RunMemory

    baseline = RunMemory.of(run_of(job)).baseline
    stages[:] = [stage for stage in stages if not stage["name"].startswith("measure")]
    for stage in stages:
        stage["total"] -= baseline if stage["kept"] >= baseline else 0


def run_of(job: Any) -> Any:
    """What is run, of a job that trains or one that does not."""
    return job.run if hasattr(job, "run") else job.adapter.run


def warm_up() -> None:
    """Import and initialize what a run would, so that it does not count as the model's."""
    import peft  # noqa: F401
    import torch
    from transformers import Trainer  # noqa: F401

    (torch.randn(256, 256, requires_grad=True) @ torch.randn(256, 256)).sum().backward()


def long_texts(folder: Path, characters: int = PIECE) -> Path:
    """The built-in pack, whose texts are joined into long ones."""
    import excise

    shutil.copytree(Path(excise.__file__).parent / "artifacts/builtin/concepts/potions", folder)
    for name in ("retain", "forget"):
        path = folder / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        # Short texts to forget state the facts; of what is retained each text is long, so that each step is.
        write(path, rows[:120] if name == "forget" else joined(rows, characters))
    for name, most in (("questions", 200), ("prompts", 8)):
        path = folder / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write(path, [row for row in rows if name == "prompts" or row["split"] == "forget"][:most])
    return folder


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def joined(rows: Iterable[dict[str, Any]], characters: int) -> Iterable[dict[str, Any]]:
    """Rows whose texts are those of many."""
    rows = list(rows)
    text = " ".join(row["text"] for row in rows)
    for start in range(0, min(len(text), TEXTS * characters), characters):
        yield {**rows[0], "id": f"long-{start}", "text": text[start : start + characters]}


def copy_of(model: str, folder: Path) -> Path:
    """The same model as another, which an audit takes for an edited one."""
    from excise.artifacts.models.find import find_model

    shutil.copytree(find_model(model).folder, folder)
    return folder


def of_process(name: str) -> int:
    """A size of this process in bytes, as the kernel tells it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
