"""Damages examples, calls their readers, and counts what came of it."""

import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from excise.editing.errors import ExciseError

from .accepted import reason_of
from .examples import EXAMPLES, Example
from .mutations import Mutation

HANG, MEMORY = 20, 2 << 30
"""Seconds and bytes that reading one small file may take."""
MOST_OF_A_KIND = 3


class Hang(BaseException):
    """Reading took too long. No Exception, so that no reader can take it for a damaged file."""


@dataclass
class Outcome:
    """What came of many damaged files."""

    refused: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Accepted cases of a single damage, by reader/file and kind."""
    unexpected: dict[str, list[str]] = field(default_factory=dict)
    """Reproductions by reader and kind of fault."""


def fuzz(seconds: float, seed: int, only: Collection[str] = (), slow: bool = True, most: int = 1 << 60) -> Outcome:
    """Damage and read until the time is over, or ``most`` files were read."""
    names = [name for name in EXAMPLES if name in only or (not only and (slow or not EXAMPLES[name].slow))]
    outcome, end = Outcome(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="excise-fuzz-") as place:
        for name in names:
            (folder := Path(place) / name).mkdir()
            EXAMPLES[name].make(folder)
            # A reader that refuses its own example would hide every fault behind it.
            EXAMPLES[name].read(folder)
        for number in range(most):
            if time.monotonic() > end:
                break
            draw = random.Random(f"{seed} {number}")
            weights = [0.05 if EXAMPLES[name].slow else 1.0 for name in names]
            (name,) = draw.choices(names, weights)
            _one(name, draw, Path(place), f"--seed {seed}, case {number}", outcome)
    return outcome


def _one(name: str, draw: random.Random, place: Path, case: str, outcome: Outcome) -> None:
    example = EXAMPLES[name]
    file = draw.choice(list(example.files))
    data = (place / name / file).read_bytes()
    mutations: list[Mutation] = []
    changed = data
    for _ in range(draw.choice([1, 1, 2])):
        try:
            mutations.append(draw.choice(example.files[file])(draw, changed))
        except (ValueError, RecursionError):
            # What a first mutation left is no JSON that a second could change.
            break
        changed = mutations[-1].change(changed)
    fault = _read(example, place, name, file, changed)
    if changed == data:
        # A flip to the same byte damages nothing.
        return
    if fault == "accepted" and len(mutations) == 1:
        outcome.kinds[f"{name}/{file}", mutations[0].kind] += 1
    if fault == "accepted":
        without = [mutation for mutation in mutations if not reason_of(f"{name}/{file}", mutation.kind)]
        if len(mutations) > 1:
            # The second may undo the first, as what is written again loses a key that stood twice.
            without = [one for one in without if _read(example, place, name, file, one.change(data)) == "accepted"]
        if without:
            fault, mutations = f"accepted without a reason: {without[0].kind}", without
    if fault in ("refused", "accepted"):
        getattr(outcome, fault)[name] += 1
        return
    kept = mutations
    if not fault.startswith("accepted"):
        kept = _shrunk(example, place, name, file, data, mutations, fault)
    reproductions = outcome.unexpected.setdefault(f"{name}/{file}: {fault}", [])
    if len(reproductions) < MOST_OF_A_KIND:
        reproductions.append(f"{case}: {'; then '.join(mutation.about for mutation in kept)}")


def _shrunk(
    example: Example, place: Path, name: str, file: str, data: bytes, mutations: list[Mutation], fault: str
) -> list[Mutation]:
    """The fewest of the mutations that give the same fault."""
    for mutation in mutations if len(mutations) > 1 else ():
        if _read(example, place, name, file, mutation.change(data)) == fault:
            return [mutation]
    return mutations


def _read(example: Example, place: Path, name: str, file: str, changed: bytes) -> str:
    """``refused``, ``accepted``, or the fault."""
    folder = place / "case" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / name, folder)
    (folder / file).write_bytes(changed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with _limited():
            example.read(folder)
    except ExciseError as error:
        # A pack's errors are one line each; all else is one line.
        text = str(error)
        return "refused" if "\n" not in text or "bad line" in text or "settings are wrong" in text else "two lines"
    except Hang:
        return f"hang over {HANG} s"
    except Exception as error:  # noqa: BLE001  which kinds come through is what this counts
        return f"{type(error).__name__} at {_where(error)}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return "accepted" if grown < MEMORY else f"{grown >> 20} MB of memory"


def _where(error: BaseException) -> str:
    """The last line of our own code on the way to an error."""
    trace, where = error.__traceback__, "?"
    while trace:
        path = Path(trace.tb_frame.f_code.co_filename)
        if not {"site-packages", "fuzz"} & set(path.parts) and "lib" not in path.parts:
            where = f"{path.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return where


class _limited:
    def __enter__(self) -> None:
        def stop(*_: object) -> None:
            raise Hang

        self.before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, HANG)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


def accepted(outcome: Outcome) -> Iterator[str]:
    """Lines of text: what was accepted after a single damage, by reader, file and kind, with counts and the reason."""
    for (place, kind), count in sorted(outcome.kinds.items()):
        yield f"{place:44} {kind:8}{count:7}  {reason_of(place, kind) or 'NO REASON'}"


def report(outcome: Outcome) -> Iterator[str]:
    """Lines of text: counts by reader, then every unexpected kind with its reproductions."""
    for name in sorted({*outcome.refused, *outcome.accepted}):
        yield f"{name:20} refused {outcome.refused[name]:6}  accepted {outcome.accepted[name]:6}"
    for kind, reproductions in outcome.unexpected.items():
        yield f"UNEXPECTED {kind}"
        yield from (f"    {one}" for one in reproductions)
    total = sum(outcome.refused.values()) + sum(outcome.accepted.values())
    yield f"{total} cases refused or accepted, {len(outcome.unexpected)} unexpected kinds"
