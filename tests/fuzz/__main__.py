"""Hold what computes against its definition for as long as one likes; what fails is made small and shown.

python -m tests.fuzz --minutes 10 [--seed 0] [--only NAME]
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fuzz.oracles import ORACLES, SIZES, worst_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Go through all oracles, a case of each at a time; the number of cases that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="Of the first case; later ones count up.")
    parser.add_argument("--only", choices=sorted(ORACLES))
    options = parser.parse_args(arguments)
    names = [options.only] if options.only else list(ORACLES)
    spent, cases, worst = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
    failed = 0
    end = time.monotonic() + 60 * options.minutes
    while time.monotonic() < end:
        # Whoever has had the least time goes next, so that slow oracles get as much of it as fast ones.
        name = min(names, key=spent.__getitem__)
        seed, started = options.seed + cases[name], time.monotonic()
        found = _tried(name, seed, SIZES[0])
        spent[name] += time.monotonic() - started
        cases[name] += 1
        worst[name] = max(worst[name], found if isinstance(found, float) else 0.0)
        if _fails(found):
            failed += 1
            smallest = min(size for size in SIZES if size == SIZES[0] or _fails(_tried(name, seed, size)))
            print(f"FAILED {name}: {found}; again: worst_of({name!r}, {seed}, {smallest})", flush=True)
    print(f"{'oracle':18}{'cases':>9}{'worst difference, as a share of what is allowed':>52}")
    for name in names:
        print(f"{name:18}{cases[name]:9}{worst[name]:52.2g}")
    print(f"{sum(cases.values())} cases, {failed} failed")
    return int(failed > 0)


def _tried(name: str, seed: int, size: int) -> float | str:
    try:
        return worst_of(name, seed, size)
    except Exception as error:  # noqa: BLE001 - any error is what is looked for
        return f"{type(error).__name__}: {error}"


def _fails(found: float | str) -> bool:
    return isinstance(found, str) or found > 1


if __name__ == "__main__":
    sys.exit(main())
