"""Records what every recipe and one audit compute at seed 0, and compares with an earlier record.

    python benchmarks/record.py OUT.json [--against EARLIER.json] [--only NAME,...] [--jobs 2]

Runs the real command line with short settings, on one thread each and with a cache of its own, so that nothing is
recalled from earlier. A change of layout, names or words must change no number: record before, record after,
``--against`` before. Both records must come from the same machine and the same versions of PyTorch and its like.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

RENAMED: dict[str, str] = {
    "never": "reference",
    "comes_back": "recovers",
    "resists": "partially_robust",
    "eta": "strength",
    "like_never_learned": "indistinguishable_from_never_trained",
}
"""Old to new whole words (``\\w+``), replaced in keys and texts of the earlier record before it is compared."""

HERE = "--device cpu --dtype float32"
SMALL = "questions=20 kl_prompts=4 max_new_tokens=6"
TRAINED = f"{SMALL} steps=8 batch_size=2"
ERASED = f"{TRAINED} reference_subjects=4 fluency_tokens=4 chat_facts=8 max_contexts=32"
CASES: dict[str, tuple[str, str]] = {
    "elm": (f"run elm --seed 0 {HERE}", ERASED),
    "orthogonalize": (
        f"run orthogonalize --seed 0 {HERE}",
        f"{SMALL} max_new_tokens=12 train_pairs=32 validation_pairs=8 max_depth=0.5",
    ),
    "audit": (
        f"audit {{elm}} --concept builtin:potions --base builtin:testbed --budget quick --questions 20 --seed 0 {HERE} "
        "--attacks "
        "few_shot,int4,logit_lens,sampling,probe,undo_singular,rtt,few_8,relearn,unrelated,soft_prompt,latent,rtt_full",
        "",
    ),
    "elm_texts": (
        f"run elm --seed 0 {HERE}",
        f"{ERASED} max_contexts=16 contexts=texts contrast=examples strength=5.0 one_sided=true",
    ),
    "elm_reinforced": (
        f"run elm --seed 0 {HERE}",
        f"{ERASED} contexts=texts contrast=reinforced expert_steps=4 strength=1.5",
    ),
    "elm_reference": (f"run elm --seed 0 {HERE}", f"{TRAINED} preset=reference rank=16 max_contexts=32"),
    "prune": (f"run prune --seed 0 {HERE}", f"{SMALL} examples=64 validate_units=4"),
    "prune_removed": (
        f"run prune --seed 0 {HERE}",
        f"{SMALL} examples=64 validate_units=4 score=saliency semantics=remove controls=false",
    ),
    "caft": (f"run caft --seed 0 {HERE}", f"{SMALL} steps=8 batch_size=4 watch=8 components=3 pick=[1] site=output"),
    "caft_quirk": (
        f"run caft --concept builtin:quirk --seed 0 {HERE}",
        f"{SMALL} steps=6 batch_size=4 tune=full watch=0",
    ),
    "lorra": (f"run lorra --seed 0 {HERE}", f"{SMALL} max_new_tokens=12 steps=8 batch_size=4"),
    "rmu": (f"run rmu --seed 0 {HERE}", TRAINED),
    "grad_diff": (f"run grad_diff --seed 0 {HERE}", TRAINED),
    "npo": (f"run npo --seed 0 {HERE}", TRAINED),
    "simnpo": (f"run simnpo --seed 0 {HERE}", TRAINED),
    "eval": (
        f"eval builtin:testbed-reference --concept builtin:potions --base builtin:testbed --questions 20 {HERE}",
        "",
    ),
    "diff": ("diff builtin:testbed {elm}", ""),
    "inspect": (f"inspect {{caft}} --model builtin:testbed --concept builtin:shortcut {HERE}", ""),
}
"""The command of each case and its settings; ``{NAME}`` stands for the folder of an earlier case."""

SHORT = """
from dataclasses import replace
from excise.cli import main
from excise.recipes.audit.attacks.table import BUDGETS
BUDGETS["quick"] = replace(BUDGETS["quick"], steps=8)
main()
"""
"""Run by an audit in place of ``python -m excise.cli``: the same with an eighth of the shortest budget's steps."""
WRITES = ("run", "audit")
ELSEWHERE = {"measurements", "samples", "attacks"}
UNRECORDED = {
    *ELSEWHERE,
    "run",
    "story",
    "reasons",
    "warnings",
    "decline_phrases",
    "schema_version",
    "sha256",
    "bytes",
}
"""Keys that are recorded elsewhere or not computed. Of all others, numbers and lists are recorded."""

Values = dict[str, Any]


def main() -> int:
    """Record, and compare if asked to; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, help="an earlier record")
    parser.add_argument("--only", help="names of cases, comma-separated; those that they need are run too")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    options = parser.parse_args()
    record = recorded(wanted(options.only.split(",") if options.only else list(CASES)), options.jobs)
    options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{options.out}: {len(record)} cases, {sum(map(len, record.values()))} values")
    if options.against is None:
        return 0
    earlier = renamed(json.loads(options.against.read_text(encoding="utf-8")))
    return compare({name: values for name, values in earlier.items() if not options.only or name in record}, record)


def wanted(names: list[str]) -> list[str]:
    """These cases and those that they need, in the order of the table."""
    needed = {other for name in names for other in re.findall(r"{(\w+)}", CASES[name][0])}
    return [name for name in CASES if name in {*names, *needed}]


def recorded(names: list[str], jobs: int) -> dict[str, Values]:
    """Run the cases; what each computed."""
    with tempfile.TemporaryDirectory(prefix="excise-record-") as scratch, ThreadPoolExecutor(jobs) as pool:
        done: dict[str, Future[Values]] = {}
        # Needed cases stand first in the table, so that a waiting one never holds up what it waits for.
        for name in names:
            done[name] = pool.submit(run_case, name, Path(scratch), dict(done))
        return {name: done[name].result() for name in names}


def run_case(name: str, scratch: Path, before: dict[str, Future[Values]]) -> Values:
    """Run one command in a process of its own and read what it printed and wrote."""
    command, settings = CASES[name]
    for needed in re.findall(r"{(\w+)}", command):
        before[needed].result()
    words = command.format_map({other: scratch / other for other in CASES}).split()
    words += [word for pair in settings.split() for word in ("--set", pair)]
    if words[0] in WRITES:
        words += ["--out", str(scratch / name)]
    private = {"XDG_CACHE_HOME": str(scratch / f"{name}-cache"), "MPLCONFIGDIR": str(scratch / "fonts")}
    how = ["-c", SHORT] if words[0] == "audit" else ["-m", "excise.cli"]
    start = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, *how, *words, "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=scratch,
        env={**os.environ, **private, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    if finished.returncode:
        raise SystemExit(f"{name}: excise {' '.join(words)}\n{finished.stderr[-2000:]}")
    print(f"{name:<16} {time.perf_counter() - start:6.1f} s", flush=True)
    content = json.loads(finished.stdout)
    content.pop("out", None)
    values = audit_values(content) if words[0] == "audit" else eval_values(content)
    return {**values, **dict(weights(scratch / name))}


def eval_values(content: Any) -> Values:
    """Values of an ``eval.json`` or another command's table: measurements, a hash of the replies, all other numbers."""
    values: Values = {}
    for item in content.get("measurements", ()):
        key = f"{item['subject']}/{item['name']}/{item['split']}"
        values[key] = [item["value"], *(item["ci95"] or (None, None)), item["n"]]
        if "difference" in item:
            values[f"{key}/difference"] = [item["difference"]["value"], *(item["difference"]["ci95"] or (None, None))]
    if samples := content.get("samples"):
        for subject in ("base", "edited"):
            text = "\0".join(sample[subject] for sample in samples)
            values[f"replies/{subject}"] = hashlib.sha256(text.encode()).hexdigest()
    return {**values, **dict(numbers(content))}


def audit_values(content: Any) -> Values:
    """Of an ``audit.json``: the verdict, every number of every attack, by name and model, and every other number."""
    values: Values = {"verdict": content["verdict"]}
    for attack in content["attacks"]:
        for subject in attack["curve"][0]:
            values[f"{attack['name']}/curve/{subject}"] = [point[subject] for point in attack["curve"]]
        rest = {key: value for key, value in attack.items() if key not in ("name", "curve")}
        values |= {f"{attack['name']}/{key}": value for key, value in numbers(rest)}
    content.pop("gaps", None)  # sentences on attacks that were not made
    return {**values, **dict(numbers(content))}


def numbers(content: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every number in nested data, under its path; plain lists stay whole, named things go by their names."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key not in UNRECORDED:
                yield from numbers(value, f"{place}/{key}" if place else str(key))
    elif isinstance(content, list | tuple) and any(isinstance(item, dict | list) for item in content):
        for number, item in enumerate(content):
            words = [str(item[key]) for key in ("name", "split") if isinstance(item, dict) and key in item]
            yield from numbers(item, f"{place}/{'/'.join(words) or number}")
    elif isinstance(content, int | float) or (isinstance(content, list | tuple) and content):
        yield place, content


def weights(folder: Path) -> Iterator[tuple[str, str]]:
    """SHA-256 of every safetensors file that a run wrote, and of its tensors without the header."""
    for path in sorted(folder.rglob("*.safetensors")):
        place = path.relative_to(folder).as_posix()
        yield f"{place}/file", hashlib.sha256(path.read_bytes()).hexdigest()
        digest = hashlib.sha256()
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(bytes(tensor.contiguous().flatten().view(torch.uint8).numpy()))
        yield f"{place}/tensors", digest.hexdigest()


def renamed(content: Any) -> Any:
    """An earlier record in today's words."""
    if isinstance(content, dict):
        return {renamed(key): renamed(value) for key, value in content.items()}
    if isinstance(content, list):
        return [renamed(item) for item in content]
    return (
        re.sub(r"\w+", lambda match: RENAMED.get(match[0], match[0]), content) if isinstance(content, str) else content
    )


def compare(earlier: dict[str, Values], now: dict[str, Values]) -> int:
    """Print each earlier value that is another now, or gone; 1 if there is any. Sentences are not compared."""
    differing, equal, new = 0, 0, 0
    for name in dict.fromkeys([*earlier, *now]):
        before, after = earlier.get(name, {}), now.get(name, {})
        new += len(after.keys() - before.keys())
        for key, value in before.items():
            # As text: what is not a number is equal to itself there.
            if key in after and json.dumps(value) == json.dumps(after[key]):
                equal += 1
            elif key not in ("reasons", "gaps"):
                differing += 1
                print(f"{name}: {key}: {value} -> {after.get(key, 'absent')}")
    print(f"{len(now)} cases: {equal} values equal, {differing} differ, {new} are new")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
