"""Hold what computes against its definition, a case of each oracle at a time; what fails is made small and shown."""

import time
from collections.abc import Sequence

from .oracles import ORACLES, SIZES, worst_of


def compare(seconds: float, seed: int, only: Sequence[str] = ()) -> int:
    """Go through oracles, print how often and how well they agreed, and return how many cases did not."""
    names = list(only) or list(ORACLES)
    spent, cases, worst = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
    failed = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        # Whoever has had the least time goes next, so that slow oracles get as much of it as fast ones.
        name = min(names, key=spent.__getitem__)
        case, started = seed + cases[name], time.monotonic()
        found = _tried(name, case, SIZES[0])
        spent[name] += time.monotonic() - started
        cases[name] += 1
        worst[name] = max(worst[name], found if isinstance(found, float) else 0.0)
        if _fails(found):
            failed += 1
            smallest = min(size for size in SIZES if size == SIZES[0] or _fails(_tried(name, case, size)))
            print(f"FAILED {name}: {found}; again: worst_of({name!r}, {case}, {smallest})", flush=True)
    print(f"{'oracle':18}{'cases':>9}{'worst difference, as a share of what is allowed':>52}")
    for name in names:
        print(f"{name:18}{cases[name]:9}{worst[name]:52.2g}")
    print(f"{sum(cases.values())} cases, {failed} failed")
    return failed


def _tried(name: str, seed: int, size: int) -> float | str:
    try:
        return worst_of(name, seed, size)
    except Exception as error:  # noqa: BLE001 - any error is what is looked for
        return f"{type(error).__name__}: {error}"


def _fails(found: float | str) -> bool:
    return isinstance(found, str) or found > 1
